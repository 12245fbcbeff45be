"""Shared bottom: one trunk, one tower a task. And the trunk of its kin.

Source: Caruana, Multitask Learning, 1997. The trunk is RankMixer's (arXiv
2507.15551), as in the comparison of MDL (arXiv 2602.07520), in which the
scenario is but a feature of this model. MMoE, PLE, STAR, HMoE and PEPNet stand
on the same `Trunk`, config and loss.

| term | code |
| --- | --- |
| bottom | `Trunk`: feature tokens, RankMixer blocks, their mean |
| tower of a task | `TaskTowers`, `head_dim` wide |
| balance of the tasks' losses | `balance`; see `layers/task_balance.py` |

Our choice: what a tower is made of.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.baselines import rankmixer
from recjax.baselines.rankmixer import RankMixerBlock
from recjax.batch import Batch
from recjax.layers import task_balance
from recjax.layers.features import FeatureTokens
from recjax.layers.heads import TaskTowers
from recjax.layers.per_token_moe import add_terms
from recjax.layers.task_balance import BalanceConfig, TaskCopies
from recjax.losses import Terms, task_losses
from recjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Config(rankmixer.Config):
  """RankMixer's fields, and how the losses are balanced.

  Attributes:
    balance: Weights of the tasks in the shared trunk.
  """

  balance: BalanceConfig = BalanceConfig()

  def __post_init__(self):
    super().__post_init__()
    rankmixer.check_single_path(self.ffn)
    self.balance.check(self.tasks)


class Model(nn.Module):
  """Trunk -> a copy a task -> one tower a task."""

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
    copies, aux["balance"] = TaskCopies(
      config.balance, len(config.tasks), name="balance"
    )(pooled)
    return towers(config)(copies, train=train), aux


class Trunk(nn.Module):
  """Feature tokens -> RankMixer blocks -> the mean over tokens.

  Attributes:
    config: RankMixer's fields.
    schema: What the batch holds.
  """

  config: rankmixer.Config
  schema: Schema

  @nn.compact
  def __call__(
    self,
    batch: Batch,
    rows: dict[str, Array],
    *,
    train: bool,
    tokens: Float[Array, "tokens batch dim"] | None = None,
  ) -> tuple[Float[Array, "batch dim"], dict[str, Any]]:
    """The pooled representation, and aux with terms, counters and tokens.

    Args:
      batch: The examples.
      rows: Feature name -> its embeddings.
      train: Whether dropout is on.
      tokens: The feature tokens, where the caller made them in another way.
    """
    config = self.config
    dtype = jnp.dtype(config.dtype)
    if tokens is None:
      tokens = FeatureTokens(
        self.schema,
        config.num_tokens,
        config.token_dim,
        config.numeric_dim,
        dtype,
        name="tokens",
      )(batch, rows)
    x, terms, counters = tokens, {}, {}
    for i in range(config.num_layers):
      x, more, counts = RankMixerBlock(
        config.mlp_ratio,
        config.dropout_rate,
        dtype,
        config.ffn,
        config.moe,
        name=f"block_{i}",
      )(x, batch.example_mask, train=train)
      terms = add_terms(terms, more)
      if counts:
        counters[f"block_{i}"] = counts
    aux = {"terms": terms, "counters": counters, "tokens": x}
    return x.mean(axis=0), aux


def towers(config: Config) -> TaskTowers:
  """One tower a task, of the config's shape; call it inside a model."""
  return TaskTowers(
    config.tasks,
    config.head_dim,
    config.dropout_rate,
    jnp.dtype(config.dtype),
    name="heads",
  )


tables = rankmixer.tables
diagnostics = rankmixer.diagnostics
idle_params = rankmixer.idle_params


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> Terms:
  """One term a task where its label is known, and those of `balance`."""
  terms = task_losses(predictions, batch)
  added = task_balance.balance_terms(terms, aux["balance"], batch, config)
  return terms | added | aux.get("terms", {})
