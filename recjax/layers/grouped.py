"""Own weights for every group of examples, at about the cost of shared ones.

Examples are sorted by group and laid into blocks of `BLOCK` rows, each of one
group, so that a block is one small matrix product with one group's weights.
The number of blocks depends on the batch size and the number of groups alone:
each group wastes less than a block. A product over 100 groups with all
examples would cost 100 times a shared one, and weights gathered for every
example would move more than the product computes.

Blocks look like tokens: `[blocks, rows, dim]`. So the layers here serve tokens
with own weights too: without `group_id`, block `i` uses weights `i`.

The sort is of the whole batch, so on a mesh the examples of all devices meet
in it; under `pmap` every replica sorts its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from recjax.layers.dropout import Dropout
from recjax.layers.per_token import KERNEL_INIT

BLOCK = 32  # Rows; of 16, 32 and 64 the fastest on a CPU at 3 and 100 groups.


@struct.dataclass
class Blocks:
  """Where the examples of a batch lie when sorted by group.

  Attributes:
    group_id: Group of each block.
    place: Place of each example among the rows of all blocks.
    example: Example in each place; the batch size where there is none.
  """

  group_id: Int[Array, " blocks"]
  place: Int[Array, " batch"]
  example: Int[Array, " places"]

  def pack(
    self, x: Float[Array, "batch ..."]
  ) -> Float[Array, "blocks rows ..."]:
    """The examples in their blocks; zeros where there is none."""
    packed = _pack(x, self.place, self.example)
    return packed.reshape(self.group_id.shape[0], -1, *x.shape[1:])

  def unpack(
    self, x: Float[Array, "blocks rows ..."]
  ) -> Float[Array, "batch ..."]:
    """The examples in the order of the batch."""
    flat = x.reshape(-1, *x.shape[2:])
    return _unpack(flat, self.place, self.example)


def sort_into_blocks(
  group_id: Int[Array, " batch"], num_groups: int, block: int = BLOCK
) -> Blocks:
  """Plans the blocks of a batch.

  Args:
    group_id: Group of each example, in [0, num_groups).
    num_groups: Number of groups, present in the batch or not.
    block: Rows of a block.

  Example:
    >>> blocks = sort_into_blocks(jnp.array([1, 0, 1]), 2, block=2)
    >>> blocks.group_id.tolist(), blocks.example.tolist()
    ([0, 1], [1, 3, 0, 2])
  """
  batch = group_id.shape[0]
  # A group with examples has less than one block more than it fills.
  num_blocks = (batch + num_groups * (block - 1)) // block
  if isinstance(batch, int):  # In an export it is a symbol of at least 1.
    num_blocks = max(1, min(num_blocks, batch))
  order = jnp.argsort(group_id)
  groups = jnp.arange(num_groups)[None]
  count = jnp.sum(group_id[:, None] == groups, axis=0)
  end_block = jnp.cumsum(-(-count // block))
  first_place = (end_block - (-(-count // block))) * block
  shift = first_place - (jnp.cumsum(count) - count)
  sorted_place = jnp.arange(batch) + shift[group_id[order]]
  place = jnp.zeros(batch, jnp.int32).at[order].set(sorted_place)
  example = jnp.full(num_blocks * block, batch, jnp.int32)
  ended = jnp.arange(num_blocks)[:, None] >= end_block[None]
  return Blocks(
    # Blocks past the last group's are empty; any group will do.
    group_id=jnp.minimum(jnp.sum(ended, axis=1), num_groups - 1),
    place=place,
    example=example.at[sorted_place].set(order),
  )


class GroupedDense(nn.Module):
  """`y = x W_g + b_g` for the rows of a block of group g.

  Attributes:
    num_groups: Sets of weights.
    features: Output width.
    use_bias: Whether there is a `b_g`.
    dtype: Type of the computation; parameters are float32.
  """

  num_groups: int
  features: int
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "blocks rows dim"],
    group_id: Int[Array, " blocks"] | None = None,
  ) -> Float[Array, "blocks rows features"]:
    shape = (self.num_groups, x.shape[-1], self.features)
    kernel = self.param("kernel", KERNEL_INIT, shape)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    y = grouped_product(x, kernel, group_id)
    if self.use_bias:
      shape = (self.num_groups, 1, self.features)
      bias = self.param("bias", nn.initializers.zeros, shape)
      y += take_groups(bias.astype(y.dtype), group_id)
    return y


class GroupedFFN(nn.Module):
  """`W2_g GELU(W1_g x + b1_g) + b2_g` for the rows of a block of group g.

  Attributes:
    num_groups: Sets of weights.
    features: Output width.
    hidden_dim: Inner width.
    dropout_rate: Share of inner units dropped in training.
    dtype: Type of the computation.
  """

  num_groups: int
  features: int
  hidden_dim: int
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "blocks rows dim"],
    group_id: Int[Array, " blocks"] | None = None,
    *,
    train: bool,
  ) -> Float[Array, "blocks rows features"]:
    def dense(features, name):
      return GroupedDense(
        self.num_groups, features, dtype=self.dtype, name=name
      )

    hidden = jax.nn.gelu(dense(self.hidden_dim, "up")(x, group_id))
    hidden = Dropout(self.dropout_rate, deterministic=not train)(hidden)
    return dense(self.features, "down")(hidden, group_id)


def grouped_product(
  x: Float[Array, "blocks rows dim"],
  kernel: Float[Array, "groups dim features"],
  group_id: Int[Array, " blocks"] | None = None,
) -> Float[Array, "blocks rows features"]:
  """Each block times the weights of its group."""
  kernel = take_groups(kernel, group_id)
  return jnp.einsum("tbi,tio->tbo", x, kernel)


def take_groups(
  weights: Float[Array, "groups ..."],
  group_id: Int[Array, " blocks"] | None,
) -> Float[Array, "blocks ..."]:
  """The weights of each block's group; without groups, block i has the i-th."""
  if group_id is None:
    return weights
  return weights.at[group_id].get(
    indices_are_sorted=True, mode="promise_in_bounds"
  )


# The transpose of a gather is a scatter, which runs on one core of a CPU. As
# each example has one place, the transpose of packing is unpacking.
@jax.custom_vjp
def _pack(x, place, example):
  del place
  return x.at[example].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _unpack(x, place, example):
  del example
  return x.at[place].get(mode="promise_in_bounds")


def _pack_fwd(x, place, example):
  return _pack(x, place, example), (place, example)


def _pack_bwd(residual, grads):
  return _unpack(grads, *residual), None, None


def _unpack_fwd(x, place, example):
  return _unpack(x, place, example), (place, example)


def _unpack_bwd(residual, grads):
  return _pack(grads, *residual), None, None


_pack.defvjp(_pack_fwd, _pack_bwd)
_unpack.defvjp(_unpack_fwd, _unpack_bwd)
