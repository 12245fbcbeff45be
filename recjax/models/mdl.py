"""MDL: scenarios and tasks as tokens that read the features at every layer.

Source: MDL, arXiv 2602.07520. A token for each scenario, one for all scenarios
and one for each task query the feature tokens layer by layer; feature tokens
never read them, and they do not read their like.

| paper | code |
| --- | --- |
| F, S, T: feature, scenario, task tokens | `x`; `DomainTokens` |
| eq. 2-3, feature tokens | `FeatureTokens` |
| eq. 4, s_k = ReLU(FFN_k(e_imp + e_spec)) | `InitialTokens` |
| e_imp, extra tables of important fields | table `domain_embedding` |
| e_spec, priors of a scenario or a task | `scenario_priors`, `task_priors` |
| eq. 6, feature self-interaction | `Model._interact` |
| eq. 7-8, domain-feature attention | `layers/domain_attention.py` |
| eq. 9-10, domain-fused aggregation | `average` in `DomainBlock` |
| eq. 11-15, per-token networks | `layers/domain_block.py` |
| eq. 16, one head a task | `heads` |

Only the token of an example's own scenario and the global one are computed:
the others are never read. See `layers/grouped.py` for how. Nor is the network
of a scenario token in the last layer, whose output nothing reads. Scenario 0,
values that training does not know, is no scenario: such an example has the
global token alone. An example has one scenario; the paper allows more.

Not stated there, our choice: no biases in the attention; the norms
(`pre_norm`: of queries and, without a gain, of features that their block leaves
without a norm; `final_norm`); the output projection (`output_projection`); one
extra table for both families of tokens; a prior that is not a token's own
enters it as zeros; the initial network has one hidden layer of the token's
width. As reported, eq. 6 ends
without the residual and norm of RankMixer: `ffn_residual=False`. What each of
the ablations and of the other `mode`s puts in place is said in `Config`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from recjax.baselines import rankmixer
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import (
  domain_attention,
  domain_tokens,
  memory_gate,
  task_balance,
)
from recjax.layers.domain_block import DomainBlock, DomainTokens, average
from recjax.layers.domain_tokens import DOMAIN_TABLE, InitialTokens, Prior
from recjax.layers.features import FeatureTokens
from recjax.layers.grouped import Blocks, sort_into_blocks
from recjax.layers.heads import TaskTowers
from recjax.layers.memory_gate import MemoryGate, check_memory, memory_tables
from recjax.layers.per_token import PerTokenDense, token_mixing
from recjax.layers.per_token_moe import add_terms, apply_ffn
from recjax.losses import Terms, task_losses
from recjax.models import msn
from recjax.schema import Schema
from recjax.sparse.table import Table

BODIES = ("rankmixer", "msn")
MODES = ("layerwise", "one_shot", "final_tower", "film", "input_concat")
TASK_ATTENTIONS = ("attention", "rankmixer")
OUTPUTS = ("per_token", "shared", "none")
# Weights of which an example uses those of one scenario.
PER_SCENARIO = (r"domain_\d+/specific_.*", r"initial/specific/.*")


@dataclasses.dataclass(frozen=True)
class Config(msn.Config):
  """RankMixer's and MSN's fields, and those of the domain tokens.

  Attributes:
    body: Feature self-interaction: `rankmixer`, or `msn` with its memories.
    mode: `layerwise`: tokens read the features after every block. `one_shot`:
      after the last one. `final_tower`: never; a task's tower gets its token
      beside the pooled features. `film`: it scales and shifts them.
      `input_concat`: all tokens enter the feature tokens instead.
    num_heads: Heads of the attention; divides `token_dim`.
    domain_dim: Width of the extra embeddings.
    important_features: Id features with an extra embedding; empty for the
      user and the item, or for all id features where neither has a role.
    scenario_priors: Features that a scenario's token reads.
    task_priors: Features that a task's token reads.
    task_tokens: False: towers on pooled features and scenarios.
    scenario_tokens: False: no scenario tokens, the global one included.
    global_token: False: no global token.
    scenario_attention: False: scenario tokens do not read features.
    task_attention: `rankmixer`: task tokens mix with the features instead of
      attending to them.
    ffn_residual: False: eq. 6 without RankMixer's second residual and norm.
    pre_norm: Whether queries are normalised for attention, and features that
      no norm of their block has left so.
    final_norm: Whether task tokens are normalised before the heads.
    output_projection: After the heads of attention: `per_token`, `shared`,
      `none`.
    balance: Weights of the losses; `none` or `uncertainty`.
  """

  body: str = "rankmixer"
  memory_layers: tuple[int, ...] = (0,)
  mode: str = "layerwise"
  num_heads: int = 4
  domain_dim: int = 16
  important_features: tuple[str, ...] = ()
  scenario_priors: tuple[Prior, ...] = ()
  task_priors: tuple[Prior, ...] = ()
  task_tokens: bool = True
  scenario_tokens: bool = True
  global_token: bool = True
  scenario_attention: bool = True
  task_attention: str = "attention"
  ffn_residual: bool = True
  pre_norm: bool = True
  final_norm: bool = True
  output_projection: str = "per_token"
  balance: task_balance.BalanceConfig = task_balance.BalanceConfig()

  def __post_init__(self):
    rankmixer.Config.__post_init__(self)
    rankmixer.check_single_path(self.ffn)
    for name, allowed in (
      ("body", BODIES),
      ("mode", MODES),
      ("task_attention", TASK_ATTENTIONS),
      ("output_projection", OUTPUTS),
    ):
      if getattr(self, name) not in allowed:
        raise UserError(
          f"model.{name} must be one of {', '.join(allowed)}, got "
          f"{getattr(self, name)!r}"
        )
    if self.num_heads < 1 or self.token_dim % self.num_heads:
      raise UserError(
        f"model.token_dim ({self.token_dim}) must be a multiple of "
        f"model.num_heads ({self.num_heads})"
      )
    if self.domain_dim < 1:
      raise UserError(
        f"model.domain_dim must be at least 1, got {self.domain_dim}"
      )
    if not self.task_tokens and self.mode not in ("layerwise", "one_shot"):
      raise UserError(
        f"model.mode={self.mode} is made of task tokens: model.task_tokens "
        "must be True"
      )
    if self.body == "msn":
      check_memory(
        self.memory_layers,
        self.gate,
        num_layers=self.num_layers,
        source="num_layers",
      )
    self.balance.check(self.tasks)
    if self.balance.kind not in ("none", "uncertainty"):
      raise UserError(
        f"model.balance.kind={self.balance.kind} needs one representation "
        "that all tasks share, and MDL's tasks read every layer; use none or "
        "uncertainty"
      )

  @property
  def reading_layers(self) -> tuple[int, ...]:
    """Blocks after which the domain tokens read the features."""
    if self.mode == "layerwise":
      return tuple(range(self.num_layers))
    return (self.num_layers - 1,) if self.mode == "one_shot" else ()


class Model(nn.Module):
  """Blocks of features, read by domain tokens -> one logit a task."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    dtype = jnp.dtype(config.dtype)
    x = FeatureTokens(
      self.schema,
      config.num_tokens,
      config.token_dim,
      config.numeric_dim,
      dtype,
      name="tokens",
    )(batch, rows["embedding"])
    # Scenario 0 is none; its examples lie in the blocks of the first one.
    num_scenarios = self.schema.num_scenarios - 1
    blocks = None
    if config.scenario_tokens and num_scenarios:
      blocks = sort_into_blocks(
        jnp.maximum(batch.scenario - 1, 0), num_scenarios
      )
    tokens = DomainTokens(
      *InitialTokens(
        self.schema,
        config.tasks,
        config.important_features,
        config.scenario_priors,
        config.task_priors,
        config.token_dim,
        use_tasks=config.task_tokens,
        use_global=config.scenario_tokens and config.global_token,
        dropout_rate=config.dropout_rate,
        dtype=dtype,
        name="initial",
      )(batch, rows, blocks, train=train)
    )
    if config.mode == "input_concat":
      context = _concat(tokens, blocks, batch.scenario)
      context = jnp.broadcast_to(context, (len(x), *context.shape))
      x += PerTokenDense(config.token_dim, dtype, name="context")(context)
    aux = {"terms": {}, "counters": {}}
    scenarios = average(tokens, blocks, batch.scenario)
    for i in range(config.num_layers):
      x = self._interact(i, x, batch, aux, train)
      if i in config.reading_layers:
        last = i == config.reading_layers[-1]
        tokens, scenarios, attention = DomainBlock(
          config, num_scenarios, last, dtype, name=f"domain_{i}"
        )(tokens, x, blocks, batch.scenario, train=train)
        aux["counters"][f"attention_{i}"] = domain_attention.count(
          attention, batch, self.schema.num_scenarios
        )
    logits = self._predict(x, tokens, scenarios, train)
    if config.balance.kind == "uncertainty":
      aux["balance"] = {
        "log_variance": self.param(
          "log_variance", nn.initializers.zeros, (len(config.tasks),)
        )
      }
    return logits, aux | {"tokens": x}

  def _interact(self, i: int, x, batch: Batch, aux, train: bool):
    """Block `i` of the features: RankMixer's, or MSN's."""
    config = self.config
    dtype = jnp.dtype(config.dtype)
    s = nn.LayerNorm(dtype=dtype, name=f"mix_norm_{i}")(token_mixing(x) + x)
    gated = s
    if config.body == "msn" and i in config.memory_layers:
      gated, aux["counters"][f"memory_{i}"] = MemoryGate(
        config.memory, config.gate, dtype, name=f"memory_{i}"
      )(s, batch.example_mask)
    y, more, counts = apply_ffn(
      config.ffn,
      config.moe,
      gated,
      batch.example_mask,
      mlp_ratio=config.mlp_ratio,
      dropout_rate=config.dropout_rate,
      dtype=dtype,
      train=train,
      name=f"ffn_{i}",
    )
    aux["terms"] = add_terms(aux["terms"], more)
    if counts:
      aux["counters"][f"ffn_{i}"] = counts
    if not config.ffn_residual:
      return y
    return nn.LayerNorm(dtype=dtype, name=f"ffn_norm_{i}")(y + s)

  def _predict(self, x, tokens: DomainTokens, scenarios, train: bool):
    """One logit a task, by what the mode gives its head."""
    config = self.config
    num_tasks, pooled = len(config.tasks), x.mean(axis=0)
    pooled = jnp.broadcast_to(pooled, (num_tasks, *pooled.shape))
    shift = 0.0 if scenarios is None else scenarios[None]
    if config.mode == "input_concat":
      inputs = pooled
    elif not config.task_tokens:
      inputs = pooled + shift
    elif config.mode in ("final_tower", "film"):
      inputs = tokens.tasks + shift
      if config.mode == "final_tower":
        inputs = jnp.concatenate([pooled, inputs], axis=-1)
      else:
        width = 2 * config.token_dim
        film = PerTokenDense(width, inputs.dtype, name="film")(inputs)
        scale, offset = jnp.split(film, 2, axis=-1)
        inputs = pooled * (1.0 + scale) + offset
    else:
      inputs = tokens.tasks
    if config.final_norm:
      # Small tokens are scaled up here, and with them what was rounded.
      inputs = inputs.astype(jnp.float32)
      inputs = nn.LayerNorm(dtype=jnp.float32, name="final_norm")(inputs)
    return TaskTowers(
      config.tasks, config.head_dim, config.dropout_rate, x.dtype, name="heads"
    )(inputs, train=train)


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The embeddings, the extra ones, and the values of MSN's memories."""
  found = rankmixer.tables(config, schema)
  found[DOMAIN_TABLE] = domain_tokens.domain_table(
    schema,
    config.important_features,
    config.domain_dim,
    init_scale=config.embed_init_scale,
  )
  if config.body == "msn":
    found |= memory_tables(
      {i: config.token_dim for i in config.memory_layers},
      config.memory,
      num_tokens=config.num_tokens,
    )
  return found


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> Terms:
  """One term a task where its label is known, and those of `balance`."""
  terms = task_losses(predictions, batch)
  added = task_balance.balance_terms(
    terms, aux.get("balance", {}), batch, config
  )
  return terms | added | aux.get("terms", {})


def diagnostics(counters: dict[str, Any]) -> dict[str, float]:
  """MSN's numbers, and by layer how evenly features are read.

  `attention_0/tasks_spread` is exp of the entropy of the mean weights of a
  token, averaged over tokens: the number of features that it reads.
  """
  maps = {k: v for k, v in counters.items() if k.startswith("attention_")}
  numbers = msn.diagnostics(
    {k: v for k, v in counters.items() if k not in maps}
  )
  for layer, families in maps.items():
    for family, sums in families.items():
      weights = domain_attention.mean_weights(sums)
      entropy = -(weights * np.log(np.maximum(weights, 1e-12))).sum(axis=-1)
      numbers[f"{layer}/{family}_spread"] = float(np.exp(entropy).mean())
  return numbers


idle_params = rankmixer.idle_params


def fold(params: Any, config: Config) -> tuple[dict[str, Any], Config]:
  """As `memory_gate.fold` where there are memories."""
  if config.body != "msn":
    return params, config
  return memory_gate.fold(params, config)


def _concat(tokens: DomainTokens, blocks: Blocks | None, scenario):
  """All tokens of an example side by side."""
  fused = average(tokens, blocks, scenario)
  parts = [] if fused is None else [fused]
  return jnp.concatenate([*parts, *tokens.tasks], axis=-1)
