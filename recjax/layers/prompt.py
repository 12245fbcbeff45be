"""A small network of an item's own, over the users who gave it feedback.

Source: PROMO (arXiv 2412.18082), as in the authors' released configuration.

| paper | code |
| --- | --- |
| g_i = W e_i, cut into prompt and weights theta_i | `PromptNetwork` |
| theta_i = W1, b1, W2, b2 | `split_weights` |
| phi_i(u) = (f_u W1 + b1) W2 + b2 | `apply_network` |
| s = sum over valid users of phi_i(u) | `pool_users` |

It knows nothing of the model around it: a ranker adds the prompts to the input
of its item.

    prompts = PromptNetwork(dim)(item, users=users, mask=mask)
    item = item + nn.Dense(dim, kernel_init=zeros)(prompts.concat())
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

NETWORKS = ("generated", "shared", "none")
POOLINGS = ("sum", "mean")


@struct.dataclass
class Weights:
  """Two layers; with a leading batch axis one network an example."""

  first: Float[Array, "*batch in_dim hidden"]
  first_bias: Float[Array, "*batch hidden"]
  second: Float[Array, "*batch hidden out_dim"]
  second_bias: Float[Array, "*batch out_dim"]


@struct.dataclass
class Prompts:
  """What `PromptNetwork` gives.

  Attributes:
    positive: Pooled users of positive feedback.
    negative: Of negative feedback; None where none was given.
    prompt: The item's own prompt; None without a generator.
  """

  positive: Float[Array, "batch dim"]
  negative: Float[Array, "batch dim"] | None
  prompt: Float[Array, "batch dim"] | None

  def concat(self) -> Float[Array, "batch width"]:
    """What an item is extended by: negatives are for the loss alone."""
    parts = [self.positive]
    if self.prompt is not None:
      parts.append(self.prompt)
    return jnp.concatenate(parts, axis=-1)


class PromptNetwork(nn.Module):
  """Generates an item's network and applies it to users.

  Attributes:
    dim: Width of prompt and pooled users.
    hidden_dim: Hidden units of the network.
    network: `generated`: one an item; `shared`: one for all; `none`: users
      are pooled as they are, and there is no prompt.
    use_relu: Whether a ReLU stands between the two layers.
    pooling: `sum` over valid users, or `mean`.
    dtype: Type of the computation.
  """

  dim: int
  hidden_dim: int = 16
  network: str = "generated"
  use_relu: bool = False
  pooling: str = "sum"
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    item: Float[Array, "batch item_dim"] | None,
    *,
    users: Float[Array, "batch max_len in_dim"],
    mask: Bool[Array, "batch max_len"],
    negatives: Float[Array, "batch other_len in_dim"] | None = None,
    negative_mask: Bool[Array, "batch other_len"] | None = None,
  ) -> Prompts:
    """Prompts of a batch of items.

    Args:
      item: What the network is generated from; None where it is `none`.
      users: Vectors of users with positive feedback on each item.
      mask: Which of them count.
      negatives: Of users with negative feedback, for a loss.
      negative_mask: Which of them count.
    """
    prompt, weights = None, None
    in_dim = users.shape[-1]
    if self.network != "none":
      num_weights = 0
      if self.network == "generated":
        num_weights = weight_count(in_dim, self.hidden_dim, self.dim)
      generated = nn.Dense(
        self.dim + num_weights,
        dtype=self.dtype,
        kernel_init=nn.initializers.xavier_normal(),
        bias_init=_uniform(1.0 / math.sqrt(item.shape[-1])),
        name="generator",
      )(item)
      prompt, flat = jnp.split(generated, [self.dim], axis=-1)
      if self.network == "shared":
        shape = (weight_count(in_dim, self.hidden_dim, self.dim),)
        flat = self.param("shared", nn.initializers.normal(0.1), shape)
        flat = flat.astype(self.dtype)
      weights = split_weights(flat, in_dim, self.hidden_dim, self.dim)

    def pool(values, mask):
      values = values.astype(self.dtype)
      return pool_users(values, mask, weights, self.use_relu, self.pooling)

    return Prompts(
      positive=pool(users, mask),
      negative=None if negatives is None else pool(negatives, negative_mask),
      prompt=prompt,
    )


def _uniform(bound: float):
  """Initialiser in [-bound, bound].

  The released generator's biases begin so, its kernel near zero: all items
  start with about one network. With biases of zero both layers would be
  products of small numbers, and hardly learn.
  """

  def init(rng, shape, dtype=jnp.float32):
    return jax.random.uniform(rng, shape, dtype, -bound, bound)

  return init


def weight_count(in_dim: int, hidden: int, out_dim: int) -> int:
  """Numbers in a network: 544 for 16, 16 and 16."""
  return in_dim * hidden + hidden + hidden * out_dim + out_dim


def split_weights(
  flat: Float[Array, "*batch numbers"], in_dim: int, hidden: int, out_dim: int
) -> Weights:
  """W1, b1, W2, b2 in this order."""
  shapes = ((in_dim, hidden), (hidden,), (hidden, out_dim), (out_dim,))
  ends, end = [], 0
  for shape in shapes[:-1]:
    end += math.prod(shape)
    ends.append(end)
  parts = jnp.split(flat, ends, axis=-1)
  return Weights(
    *(
      part.reshape(*flat.shape[:-1], *shape)
      for part, shape in zip(parts, shapes, strict=True)
    )
  )


def pool_users(
  users: Float[Array, "batch max_len in_dim"],
  mask: Bool[Array, "batch max_len"],
  weights: Weights | None,
  use_relu: bool,
  pooling: str,
) -> Float[Array, "batch out_dim"]:
  """`sum_u phi(u)` over valid users, or their mean; zeros where none is."""
  count = mask.sum(axis=-1, keepdims=True).astype(users.dtype)
  weight = mask.astype(users.dtype)
  if pooling == "mean":
    weight /= jnp.maximum(count, 1.0)
    count = jnp.minimum(count, 1.0)
  if weights is None:
    return jnp.einsum("bl,bld->bd", weight, users)
  if not use_relu:
    # Two linear layers: the sum may be taken first, ten times less work.
    total = jnp.einsum("bl,bld->bd", weight, users)[:, None]
    return apply_network(weights, total, count[:, None], False)[:, 0]
  phi = apply_network(weights, users, jnp.ones((), users.dtype), True)
  return jnp.einsum("bl,bld->bd", weight, phi)


def apply_network(
  weights: Weights,
  users: Float[Array, "batch max_len in_dim"],
  count: Float[Array, "*batch"],
  use_relu: bool,
) -> Float[Array, "batch max_len out_dim"]:
  """`(x W1 + n b1) W2 + n b2`, of x that is a sum over n users."""
  batch = "b" if weights.first.ndim == 3 else ""  # Else one for all.
  if not batch:
    bias_1, bias_2 = weights.first_bias[None], weights.second_bias[None]
  else:
    bias_1, bias_2 = weights.first_bias, weights.second_bias
  hidden = jnp.einsum(f"bli,{batch}ih->blh", users, weights.first)
  hidden += count * bias_1[:, None]
  hidden = nn.relu(hidden) if use_relu else hidden
  output = jnp.einsum(f"blh,{batch}ho->blo", hidden, weights.second)
  return output + count * bias_2[:, None]
