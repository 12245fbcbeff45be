"""CB2CF: a cold item's embedding is what its content predicts.

Source: Barkan et al., CB2CF: A Neural Multiview Content-to-Collaborative
Filtering Model for Completely Cold Item Recommendations, RecSys 2019,
arXiv 1611.00384.

| paper | code |
| --- | --- |
| CF vector of an item | its id's embedding in the trained backbone |
| network from content to it, mean squared error | `Content`, term `content` |
| cold items: the predicted vector | `cold_below` |

Departures: the backbone is PROMO's (`layers/two_tower.py`), and the content its
item features; the paper has text and other views, each with its network. The
hidden layer of `hidden_dim` tanh units is our choice. Only warm items teach the
network: embeddings of cold ones are hardly trained.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.layers import two_tower
from recjax.layers.two_tower import TowersConfig, TowersModel
from recjax.stage import Stage


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of every embedding and vector.
    towers: What both sides read; the item's side needs features.
    hidden_dim: Hidden units between content and embedding.
    popularity: Sparse feature whose ids rise with the item's popularity.
    cold_below: Items with a smaller id in it get the predicted embedding.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  hidden_dim: int = 32
  popularity: str = "item_positives"
  cold_below: int = 3
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self, hidden_dim=1)


class Model(TowersModel):
  """Two towers; the content stands in for the ids of cold items."""

  def setup(self):
    super().setup()
    config = self.config
    dtype = jnp.dtype(config.dtype)
    self.hidden = nn.Dense(config.hidden_dim, dtype=dtype)
    self.content = nn.Dense(config.embed_dim, dtype=dtype)

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
    features = two_tower.concat_named(
      self.schema, config.towers.item_features, batch, embeddings
    )
    predicted = self.content(nn.tanh(self.hidden(features)))
    item_id = embeddings[two_tower.roles(self.schema)[1]]
    is_cold = batch.ids[config.popularity] < config.cold_below
    mixed = jnp.where(is_cold[:, None], predicted.astype(jnp.float32), item_id)
    scores = self.backbone(encoded, batch, rows, item_id=mixed).scores
    towers = self.backbone(encoded, batch, rows)
    return scores, {
      "sequence": towers.sequence_scores,
      "towers": towers.scores,
      "predicted": predicted,
      "item_id": item_id,
    }


STAGES = (
  *two_tower.BACKBONE_STAGES,
  Stage(
    "content",
    share=0.35,
    trainable=("hidden/.*", "content/.*"),
    initialize_from="best",
  ),
)


tables = two_tower.cold_tables


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The tasks' losses, and `content`, the squared error of the embeddings."""
  is_warm = batch.ids[config.popularity] >= config.cold_below
  target = jax.lax.stop_gradient(aux["item_id"])
  error = jnp.square(aux["predicted"].astype(jnp.float32) - target)
  terms = losses.task_losses(predictions, batch)
  terms["content"] = losses.masked_sum(
    error.sum(axis=-1), is_warm & batch.example_mask
  )
  return terms
