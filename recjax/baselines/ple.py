"""PLE: levels of shared and of tasks' own experts.

Source: Tang et al., Progressive Layered Extraction, RecSys 2020, doi
10.1145/3383313.3412236.

| paper | code |
| --- | --- |
| x | `pooled`, the mean token of a RankMixer trunk |
| E_k, experts of task k; E_s, shared ones | `task_experts`, `shared_experts` |
| g^k over E_k and E_s | `task_gate` |
| g^s over all experts | `shared_gate`; none at the top |
| h^k | `TaskTowers` |

Gates read the input of their level: a task's own, or the shared one. With one
level it is CGC. Numbers and widths of experts are our choice. Below the first
level the tasks' gradients have no place of their own, since shared experts mix
them: of the balances, those that need one are refused.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax.baselines import shared_bottom
from recjax.baselines.mmoe import Experts
from recjax.baselines.shared_bottom import Trunk, towers
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.dropout import Dropout
from recjax.layers.per_token import PerTokenDense
from recjax.layers.task_balance import TaskCopies
from recjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Config(shared_bottom.Config):
  """The trunk's fields, and the experts.

  Attributes:
    num_levels: Levels of experts.
    num_task_experts: Experts of each task at a level.
    num_shared_experts: Shared experts at a level.
    expert_dim: Width of an expert.
  """

  num_levels: int = 2
  num_task_experts: int = 1
  num_shared_experts: int = 2
  expert_dim: int = 32

  def __post_init__(self):
    super().__post_init__()
    if self.balance.kind not in ("none", "uncertainty"):
      raise UserError(
        f"model.balance.kind={self.balance.kind} needs gradients by task, and "
        "PLE's shared experts mix them; use none or uncertainty"
      )
    config_lib.check_network(
      self,
      num_levels=1,
      num_task_experts=1,
      num_shared_experts=1,
      expert_dim=1,
    )


class Model(nn.Module):
  """Trunk -> levels of experts -> one tower a task."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    pooled, aux = Trunk(config, self.schema, name="trunk")(
      batch, rows["embedding"], train=train
    )
    tasks, aux["balance"] = TaskCopies(
      config.balance, len(config.tasks), name="balance"
    )(pooled)
    shared = pooled
    for i in range(config.num_levels):
      tasks, shared = Level(
        config, top=i == config.num_levels - 1, name=f"level_{i}"
      )(tasks, shared, train=train)
    return towers(config)(tasks, train=train), aux


class Level(nn.Module):
  """One level: experts, and a mixture of them for each task and the shared.

  Attributes:
    config: The model's.
    top: Whether nothing reads the shared mixture.
  """

  config: Config
  top: bool

  @nn.compact
  def __call__(
    self,
    tasks: Float[Array, "tasks batch dim"],
    shared: Float[Array, "batch dim"],
    *,
    train: bool,
  ) -> tuple[Float[Array, "tasks batch out"], Float[Array, "batch out"] | None]:
    """The tasks' mixtures and, below the top, the shared one."""
    config = self.config
    dtype, dim = jnp.dtype(config.dtype), config.expert_dim
    num_own, num_shared = config.num_task_experts, config.num_shared_experts
    num_tasks = len(tasks)
    own = PerTokenDense(num_own * dim, dtype, name="task_experts")(tasks)
    own = Dropout(config.dropout_rate, deterministic=not train)(nn.gelu(own))
    own = own.reshape(num_tasks, -1, num_own, dim)
    common = Experts(
      num_shared, dim, config.dropout_rate, dtype, name="shared_experts"
    )(shared, train=train).swapaxes(0, 1)
    gates = PerTokenDense(num_own + num_shared, dtype, name="task_gate")(tasks)
    gates = _softmax(gates)
    mixed = jnp.einsum("tbe,tbed->tbd", gates[..., :num_own], own)
    mixed += jnp.einsum("tbe,bed->tbd", gates[..., num_own:], common)
    if self.top:
      return mixed, None
    shape = (shared.shape[0], num_tasks * num_own, dim)
    every = own.transpose(1, 0, 2, 3).reshape(shape)
    every = jnp.concatenate([every, common], axis=1)
    gates = nn.Dense(every.shape[1], dtype=dtype, name="shared_gate")(shared)
    return mixed, jnp.einsum("be,bed->bd", _softmax(gates), every)


def _softmax(logits: Float[Array, "..."]) -> Float[Array, "..."]:
  return jax.nn.softmax(logits.astype(jnp.float32)).astype(logits.dtype)


tables = shared_bottom.tables
loss_fn = shared_bottom.loss_fn
diagnostics = shared_bottom.diagnostics
idle_params = shared_bottom.idle_params
