"""MMoE: experts that every task mixes by a gate of its own.

Source: Ma et al., Modeling Task Relationships in Multi-task Learning with
Multi-gate Mixture-of-Experts, KDD 2018, doi 10.1145/3219819.3220007.

| paper | code |
| --- | --- |
| x | `pooled`, the mean token of a RankMixer trunk |
| f_i, the experts | `experts`, one hidden layer with GELU |
| g^k(x) = softmax(W_gk x) | `gate` |
| h^k | `TaskTowers` |

For several scenarios each pair of a scenario and a task has its own gate, as
is common (`scenario_gates`); the paper knows tasks alone. The width and number
of the experts are our choice. `balance` acts on the experts' outputs; what the
gates send to the trunk is the plain sum.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax.baselines import shared_bottom
from recjax.baselines.shared_bottom import Trunk, towers
from recjax.batch import Batch
from recjax.layers.dropout import Dropout
from recjax.layers.grouped import GroupedDense, sort_into_blocks
from recjax.layers.task_balance import TaskCopies
from recjax.schema import Schema

PER_SCENARIO = (r"scenario_gate/.*",)


@dataclasses.dataclass(frozen=True)
class Config(shared_bottom.Config):
  """The trunk's fields, and the experts.

  Attributes:
    num_experts: Experts.
    expert_dim: Width of an expert.
    scenario_gates: Whether each scenario has gates of its own.
  """

  num_experts: int = 4
  expert_dim: int = 64
  scenario_gates: bool = True

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_network(self, num_experts=1, expert_dim=1)


class Model(nn.Module):
  """Trunk -> experts -> one mixture and one tower a task."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    num_tasks = len(config.tasks)
    dtype = jnp.dtype(config.dtype)
    pooled, aux = Trunk(config, self.schema, name="trunk")(
      batch, rows["embedding"], train=train
    )
    outputs = Experts(
      config.num_experts,
      config.expert_dim,
      config.dropout_rate,
      dtype,
      name="experts",
    )(pooled, train=train)
    width = num_tasks * config.num_experts
    if config.scenario_gates and self.schema.num_scenarios > 1:
      num = self.schema.num_scenarios
      blocks = sort_into_blocks(batch.scenario, num)
      gates = blocks.unpack(
        GroupedDense(num, width, dtype=dtype, name="scenario_gate")(
          blocks.pack(pooled), blocks.group_id
        )
      )
    else:
      gates = nn.Dense(width, dtype=dtype, name="gate")(pooled)
    copies, aux["balance"] = TaskCopies(
      config.balance, num_tasks, name="balance"
    )(outputs)
    gates = gates.reshape(-1, num_tasks, config.num_experts)
    return towers(config)(mix(gates, copies), train=train), aux


class Experts(nn.Module):
  """`GELU(W_e x + b_e)` of every expert.

  Attributes:
    num_experts: Experts.
    features: Their width.
    dropout_rate: Share of units dropped in training.
    dtype: Type of the computation.
  """

  num_experts: int
  features: int
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch dim"], *, train: bool
  ) -> Float[Array, "experts batch features"]:
    # One product for all experts: they read the same input.
    hidden = nn.Dense(
      self.num_experts * self.features, dtype=self.dtype, name="up"
    )(x)
    hidden = nn.gelu(hidden)
    hidden = Dropout(self.dropout_rate, deterministic=not train)(hidden)
    hidden = hidden.reshape(-1, self.num_experts, self.features)
    return hidden.swapaxes(0, 1)


def mix(
  logits: Float[Array, "batch tasks experts"],
  outputs: Float[Array, "tasks experts batch dim"],
) -> Float[Array, "tasks batch dim"]:
  """Each task's mixture of its copy of the experts' outputs."""
  gates = jax.nn.softmax(logits.astype(jnp.float32)).astype(outputs.dtype)
  return jnp.einsum("bte,tebd->tbd", gates, outputs)


tables = shared_bottom.tables
loss_fn = shared_bottom.loss_fn
diagnostics = shared_bottom.diagnostics
idle_params = shared_bottom.idle_params
