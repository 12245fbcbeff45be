"""HMoE: each scenario predicts, and learns how far to trust the others.

Source: Li et al., Improving Multi-Scenario Learning to Rank in E-commerce by
Exploiting Task Relationships in the Label Space, CIKM 2020, doi
10.1145/3340531.3412713.

| paper | code |
| --- | --- |
| x | `pooled`, the mean token of a RankMixer trunk |
| implicit: experts mixed by the gates of a scenario | `experts`, `gate` |
| explicit: prediction of scenario j | `tower_hidden`, `tower` |
| weight of j for an example of i | `trust`, softmax over scenarios |
| no gradient from i to the tower of j | `stop_others` |

Written from the paper's description, in our words: y = sum_j w_ij(x) f_j(x),
on logits. Every scenario's towers are computed for every example, which is
what the method is; its cost grows with the scenarios. Several tasks share
experts, gates and trust, and have towers of their own (our choice, as are the
widths). `balance` acts on the experts' outputs.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax.baselines import shared_bottom
from recjax.baselines.mmoe import Experts, mix
from recjax.baselines.shared_bottom import Trunk
from recjax.batch import Batch
from recjax.layers.dropout import Dropout
from recjax.layers.grouped import GroupedDense, sort_into_blocks
from recjax.layers.per_token import KERNEL_INIT
from recjax.layers.task_balance import TaskCopies
from recjax.schema import Schema

PER_SCENARIO = (r"trust/.*",)


@dataclasses.dataclass(frozen=True)
class Config(shared_bottom.Config):
  """The trunk's fields, and the experts.

  Attributes:
    num_experts: Experts that all scenarios share.
    expert_dim: Width of an expert.
    stop_others: Whether an example trains no other scenario's tower.
  """

  num_experts: int = 4
  expert_dim: int = 32
  stop_others: bool = True

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_network(self, num_experts=1, expert_dim=1)


class Model(nn.Module):
  """Trunk -> experts -> towers of all scenarios -> their mixture."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config, num = self.config, self.schema.num_scenarios
    dtype, num_tasks = jnp.dtype(config.dtype), len(config.tasks)
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
    copies, aux["balance"] = TaskCopies(
      config.balance, num_tasks, name="balance"
    )(outputs)
    gates = nn.Dense(num * config.num_experts, dtype=dtype, name="gate")(pooled)
    gates = gates.reshape(-1, num, config.num_experts)
    # [tasks, scenarios, batch, dim]
    mixed = jnp.stack(
      [
        mix(gates, jnp.broadcast_to(copy, (num, *copy.shape)))
        for copy in copies
      ]
    )
    logits = self._towers(mixed, train)
    own = jax.nn.one_hot(batch.scenario, num, dtype=logits.dtype)
    if config.stop_others:
      other = jax.lax.stop_gradient(logits)
      logits = other + own.T[None] * (logits - other)
    if num > 1:
      blocks = sort_into_blocks(batch.scenario, num)
      trust = GroupedDense(num, num, dtype=dtype, name="trust")(
        blocks.pack(pooled), blocks.group_id
      )
      own = jax.nn.softmax(blocks.unpack(trust).astype(jnp.float32))
    logits = jnp.einsum("tsb,bs->tb", logits, own)
    return dict(zip(config.tasks, logits, strict=True)), aux

  def _towers(self, x: Float[Array, "tasks scenarios batch dim"], train: bool):
    """Logits of every scenario: [tasks, scenarios, batch]."""
    config = self.config
    if config.head_dim:
      hidden = self._dense("tower_hidden", x, config.head_dim, x.dtype)
      x = Dropout(config.dropout_rate, deterministic=not train)(nn.gelu(hidden))
    return self._dense("tower", x, 1, jnp.float32)[..., 0]

  def _dense(self, name: str, x, features: int, dtype):
    """One set of weights a task and scenario."""
    leading, dim = x.shape[:2], x.shape[-1]

    def init(rng, shape):
      return KERNEL_INIT(rng, (shape[0] * shape[1], *shape[2:])).reshape(shape)

    kernel = self.param(f"{name}_kernel", init, (*leading, dim, features))
    bias = self.param(
      f"{name}_bias", nn.initializers.zeros, (*leading, 1, features)
    )
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
    return jnp.einsum("tsbi,tsio->tsbo", x, kernel) + bias


tables = shared_bottom.tables
loss_fn = shared_bottom.loss_fn
diagnostics = shared_bottom.diagnostics
idle_params = shared_bottom.idle_params
