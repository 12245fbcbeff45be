"""STAR: towers whose weights are shared ones times those of the scenario.

Source: Sheng et al., One Model to Serve All: Star Topology Adaptive
Recommender, CIKM 2021, arXiv 2101.11427.

| paper | code |
| --- | --- |
| z | `pooled`, the mean token of a RankMixer trunk |
| eq. 3-4, partitioned normalisation | `PartitionedNorm` |
| eq. 5-7, W = W_s * W_p, b = b_s + b_p | `StarDense`, one tower a task |
| auxiliary network, s_m + s_a | `auxiliary_hidden`, `auxiliary` |

The paper normalises by the moments of a scenario's rows in the batch, and
serves with moving averages of them. Here nothing is stored beside parameters,
so the moments of each scenario are parameters: a term of the loss pulls them to
those of the batch (`moments`), and training normalises by them as serving
does. Our choice: that, the shape of the auxiliary network, and W_p starting
near one.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax import config as config_lib
from recjax.baselines import shared_bottom
from recjax.baselines.shared_bottom import Trunk
from recjax.batch import Batch
from recjax.layers.dropout import Dropout
from recjax.layers.grouped import Blocks, sort_into_blocks, take_groups
from recjax.layers.per_token import KERNEL_INIT
from recjax.layers.task_balance import TaskCopies
from recjax.losses import Terms, masked_sum
from recjax.schema import Schema

PER_SCENARIO = (r"norm/(mean|variance|.*_offset)", r"layer_\d+/own_.*")


@dataclasses.dataclass(frozen=True)
class Config(shared_bottom.Config):
  """The trunk's fields, and the towers.

  Attributes:
    tower_dims: Hidden widths of a tower.
    auxiliary_dim: Hidden width of the auxiliary network; 0 for none.
    moment_weight: Of the loss that the moments learn from.
  """

  tower_dims: tuple[int, ...] = (64,)
  auxiliary_dim: int = 16
  moment_weight: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_network(self, tower_dims=1, auxiliary_dim=0)


class Model(nn.Module):
  """Trunk -> normalisation by scenario -> star towers, plus the auxiliary."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    dtype, num_tasks = jnp.dtype(config.dtype), len(config.tasks)
    pooled, aux = Trunk(config, self.schema, name="trunk")(
      batch, rows["embedding"], train=train
    )
    num = self.schema.num_scenarios
    normed, aux["moments"] = PartitionedNorm(num, dtype, name="norm")(
      pooled, batch.scenario, batch.example_mask
    )
    copies, aux["balance"] = TaskCopies(
      config.balance, num_tasks, name="balance"
    )(normed)
    blocks = sort_into_blocks(batch.scenario, num)
    # [blocks, rows, tasks, dim]
    x = blocks.pack(copies.swapaxes(0, 1))
    for i, dim in enumerate((*config.tower_dims, 1)):
      x = StarDense(num, dim, dtype, name=f"layer_{i}")(x, blocks)
      if i < len(config.tower_dims):
        x = Dropout(config.dropout_rate, deterministic=not train)(nn.gelu(x))
    logits = blocks.unpack(x)[..., 0].T.astype(jnp.float32)
    if config.auxiliary_dim:
      inputs = pooled
      if self.schema.roles.scenario is not None:
        scenario = rows["embedding"][self.schema.roles.scenario]
        inputs = jnp.concatenate([scenario.astype(dtype), pooled], axis=-1)
      hidden = nn.Dense(
        config.auxiliary_dim, dtype=dtype, name="auxiliary_hidden"
      )(inputs)
      logits += nn.Dense(num_tasks, dtype=jnp.float32, name="auxiliary")(
        nn.gelu(hidden)
      ).T
    return dict(zip(config.tasks, logits, strict=True)), aux


class PartitionedNorm(nn.Module):
  """`(g g_p) (z - E_p) / sqrt(V_p + eps) + (b + b_p)` for scenario p.

  Attributes:
    num_scenarios: Partitions.
    dtype: Type of the result.
    epsilon: Added to the variance.
  """

  num_scenarios: int
  dtype: jax.typing.DTypeLike = jnp.float32
  epsilon: float = 1e-5

  @nn.compact
  def __call__(
    self,
    z: Float[Array, "batch dim"],
    scenario: Int[Array, " batch"],
    example_mask,
  ) -> tuple[Float[Array, "batch dim"], tuple[Array, Array]]:
    """The normalised rows, and the moments' loss as (sum, weight)."""
    dim = z.shape[-1]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    shape = (self.num_scenarios, dim)
    mean = self.param("mean", zeros, shape)[scenario]
    variance = self.param("variance", ones, shape)[scenario]
    gain = self.param("scale", ones, (1, dim))
    # As offsets from one and zero, so that the scenarios start alike.
    gain = gain * (1.0 + self.param("scale_offset", zeros, shape)[scenario])
    bias = self.param("bias", zeros, (1, dim))
    bias = bias + self.param("bias_offset", zeros, shape)[scenario]
    raw = jax.lax.stop_gradient(z.astype(jnp.float32))
    centred = raw - mean
    square = jnp.square(jax.lax.stop_gradient(centred))
    errors = jnp.square(centred) + jnp.square(square - variance)
    moments = masked_sum(errors.mean(axis=-1) / 2, example_mask)
    mean, variance = jax.lax.stop_gradient((mean, variance))
    # The step of an optimiser may carry a variance below zero.
    scale = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.epsilon)
    return (gain * (z - mean) * scale + bias).astype(self.dtype), moments


class StarDense(nn.Module):
  """`x (W * W_p) + b + b_p` of every task, for rows in blocks.

  Attributes:
    num_scenarios: Sets of W_p and b_p.
    features: Output width.
    dtype: Type of the computation.
  """

  num_scenarios: int
  features: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "blocks rows tasks dim"], blocks: Blocks
  ) -> Float[Array, "blocks rows tasks features"]:
    tasks, dim = x.shape[2:]
    shape = (tasks, dim, self.features)
    shared = self.param("kernel", KERNEL_INIT, shape)
    own = self.param("own_kernel", _near_one, (self.num_scenarios, *shape))
    zeros = nn.initializers.zeros
    bias = self.param("bias", zeros, (tasks, self.features))
    own_bias = self.param(
      "own_bias", zeros, (self.num_scenarios, tasks, self.features)
    )
    kernel = take_groups(shared[None] * own, blocks.group_id)
    bias = take_groups(bias[None] + own_bias, blocks.group_id)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return jnp.einsum("nrti,ntio->nrto", x, kernel) + bias[:, None]


def _near_one(rng, shape, dtype=jnp.float32):
  return 1.0 + 0.1 * jax.random.normal(rng, shape, dtype)


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> Terms:
  """The losses of the tasks, and `moments` of the normalisation."""
  total, weight = aux["moments"]
  moments = {"moments": (config.moment_weight * total, weight)}
  return shared_bottom.loss_fn(predictions, aux, batch, config) | moments


tables = shared_bottom.tables
diagnostics = shared_bottom.diagnostics
idle_params = shared_bottom.idle_params
