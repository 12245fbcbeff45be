"""PLATE: prompt vectors of a domain and of a user, on a frozen backbone.

Source: Wang et al., PLATE: A Prompt-Enhanced Paradigm for Multi-Scenario
Recommendations, SIGIR 2023, doi 10.1145/3539618.3591750.

| paper | code |
| --- | --- |
| domain prompt, one vector a domain | `domain`: cold items and warm ones |
| user prompt, one vector a user | table `prompt_user` |
| pre-trained model frozen, prompts tuned | third of `STAGES` |

Departures: the backbone is PROMO's (`layers/two_tower.py`), which reads ids and
features and no sequence of tokens, so that a prompt is added to the id's
embedding of its side (our choice); prompts begin at or near zero, where the
model is the backbone. The domains are cold and warm items, as in PROMO's
comparison.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.layers import two_tower
from recjax.layers.two_tower import TowersConfig, TowersModel
from recjax.schema import Schema
from recjax.sparse.table import Table
from recjax.stage import Stage


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of every embedding and vector.
    towers: What both sides read.
    popularity: Sparse feature whose ids rise with the item's popularity.
    cold_below: Items with a smaller id in it are the cold domain.
    prompt_init_scale: Standard deviation of initial user prompts.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  popularity: str = "item_positives"
  cold_below: int = 3
  prompt_init_scale: float = 1e-3
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self)


class Model(TowersModel):
  """Two towers, each id with its prompt."""

  def setup(self):
    super().setup()
    self.domain = self.param(
      "domain", nn.initializers.zeros, (2, self.config.embed_dim)
    )

  def decode(
    self,
    encoded: Float[Array, "users dim"],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions; `encoded` is of each example, or of one user for all."""
    del train
    config, embeddings = self.config, rows["embedding"]
    user, item = two_tower.roles(self.schema)
    is_warm = batch.ids[config.popularity] >= config.cold_below
    domain = self.domain[is_warm.astype(jnp.int32)]
    prompted = self.backbone(
      encoded,
      batch,
      rows,
      user_id=embeddings[user] + rows["prompt_user"][user],
      item_id=embeddings[item] + domain,
    )
    towers = self.backbone(encoded, batch, rows)
    return prompted.scores, {
      "sequence": towers.sequence_scores,
      "towers": towers.scores,
    }


STAGES = (
  *two_tower.BACKBONE_STAGES,
  Stage(
    "prompts",
    share=0.35,
    trainable=("prompt_user", "domain"),
    initialize_from="best",
  ),
)


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The backbone's tables, and the users' prompts."""
  two_tower.check_towers(config.towers, schema, config.embed_dim)
  two_tower.check_popularity(schema, config.popularity)
  found = two_tower.tower_tables(
    config.towers, schema, config.embed_dim, init_scale=config.embed_init_scale
  )
  user, _ = two_tower.roles(schema)
  found["prompt_user"] = two_tower.named_table(
    schema, (user,), config.embed_dim, init_scale=config.prompt_init_scale
  )
  return found


loss_fn = losses.plain_loss_fn
