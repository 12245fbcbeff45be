"""One layer of MDL's tokens: they read, are fused, and pass a network.

Source: MDL, arXiv 2602.07520, eq. 7-15; see `recjax.models.mdl`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from recjax.layers import task_balance
from recjax.layers.domain_attention import (
  DomainAttention,
  MixWithFeatures,
  attend,
  attend_together,
)
from recjax.layers.grouped import Blocks, GroupedFFN


@struct.dataclass
class DomainTokens:
  """The tokens of scenarios and tasks; None where the config has none.

  Attributes:
    specific: The token of each example's scenario, in blocks of `Blocks`.
    everywhere: The global token.
    tasks: One token a task.
  """

  specific: Float[Array, "blocks rows dim"] | None
  everywhere: Float[Array, "1 batch dim"] | None
  tasks: Float[Array, "tasks batch dim"] | None


class DomainBlock(nn.Module):
  """One layer of the scenario and task tokens; eq. 7-15.

  Attributes:
    config: The model's.
    num_scenarios: Scenarios with a token of their own.
    last: Whether no later layer reads the scenario tokens.
    dtype: Type of the computation.
  """

  config: Any
  num_scenarios: int
  last: bool
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(
    self,
    tokens: DomainTokens,
    x: Float[Array, "features batch dim"],
    blocks: Blocks | None,
    scenario: Int[Array, " batch"],
    *,
    train: bool,
  ) -> tuple[DomainTokens, Array | None, dict[str, Array]]:
    """The next tokens, the fused scenarios, and attention by family."""
    config, attention = self.config, {}
    specific, everywhere = tokens.specific, tokens.everywhere
    tasks, num_tasks = tokens.tasks, len(config.tasks)
    features = x.swapaxes(0, 1)
    if config.pre_norm and not config.ffn_residual:
      # The projections of each token stand for gain and bias.
      features = nn.LayerNorm(
        use_scale=False, use_bias=False, dtype=self.dtype, name="feature_norm"
      )(features)
    read, attention = self._read(tokens, features, blocks)
    if "specific" in read:
      specific += read["specific"]
    if "everywhere" in read:
      everywhere += read["everywhere"]
    # Eq. 9 takes the scenarios before their networks.
    fused = average(DomainTokens(specific, everywhere, None), blocks, scenario)
    if tasks is not None:
      if config.task_attention == "rankmixer":
        tasks += MixWithFeatures(self.dtype, name="tasks_mixing")(tasks, x)
      else:
        tasks += read["tasks"]
      if fused is not None:
        tasks += fused[None]
      tasks += self._network("tasks", num_tasks)(tasks, train=train)
    if not self.last:
      if specific is not None:
        specific += self._network("specific", self.num_scenarios)(
          specific, blocks.group_id, train=train
        )
      if everywhere is not None:
        everywhere += self._network("everywhere", 1)(everywhere, train=train)
    return DomainTokens(specific, everywhere, tasks), fused, attention

  def _read(self, tokens: DomainTokens, features, blocks: Blocks | None):
    """What the tokens of each family read, and their attention weights."""
    config = self.config
    sizes = {}
    if config.scenario_attention:
      if tokens.specific is not None:
        sizes["specific"] = self.num_scenarios
      if tokens.everywhere is not None:
        sizes["everywhere"] = 1
    if tokens.tasks is not None and config.task_attention == "attention":
      sizes["tasks"] = len(config.tasks)
    maps = {
      family: DomainAttention(
        num,
        config.token_dim,
        config.num_heads,
        config.pre_norm,
        config.output_projection,
        self.dtype,
        name=f"{family}_attention",
      )
      for family, num in sizes.items()
    }
    place = {"specific": blocks}
    asked = {
      family: own.ask(getattr(tokens, family), place.get(family))
      for family, own in maps.items()
    }
    found = {}
    if "tasks" in asked and self._hands_out_copies:
      # One a task, so that a gradient reaches each of them apart.
      shape = (len(config.tasks), *features.shape)
      copies = self.perturb(
        task_balance.COPIES, jnp.broadcast_to(features, shape)
      )
      found["tasks"] = attend(asked.pop("tasks"), copies)
    if asked:
      found |= attend_together(asked, features)
    read = {
      family: maps[family].receive(found[family][1], place.get(family))
      for family in maps
    }
    return read, {family: weights for family, (weights, _) in found.items()}

  def _network(self, family: str, num: int) -> nn.Module:
    config = self.config
    return GroupedFFN(
      num,
      config.token_dim,
      int(config.mlp_ratio * config.token_dim),
      config.dropout_rate,
      self.dtype,
      name=f"{family}_ffn",
    )

  @property
  def _hands_out_copies(self) -> bool:
    """Whether `task_gradients` asks for them."""
    asked = self.is_mutable_collection("perturbations") or (
      "perturbations" in self.scope.root.variables()
    )
    return asked and self.last


def average(tokens: DomainTokens, blocks: Blocks | None, scenario):
  """Mean of an example's scenario token and the global one; eq. 9."""
  total, count = None, 0.0
  if tokens.specific is not None:
    known = (scenario > 0)[:, None]
    total = jnp.where(known, blocks.unpack(tokens.specific), 0.0)
    count = known.astype(total.dtype)
  if tokens.everywhere is not None:
    everywhere = tokens.everywhere[0]
    total = everywhere if total is None else total + everywhere
    count = count + 1.0
  if total is None:
    return None
  return total / jnp.maximum(count, 1.0)
