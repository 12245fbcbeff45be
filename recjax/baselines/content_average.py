"""Content average: a cold item's embedding is the mean of its like's.

Source: the plainest of the rivals that cold-start papers compare with; the form
here is ours, on PROMO's backbone (`layers/two_tower.py`):

* each value of an item feature (an author, a genre) has the mean of the trained
  embeddings of warm items with that value, by their examples;
* a cold item's embedding is the mean of its values' means.

The means are a table, `average`, moved towards the embeddings by its squared
error in the last stage; the tasks' losses do not touch it. Only features that
are ids have values to average over; numbers and vectors are left to the item's
tower.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import two_tower
from recjax.layers.features import masked_mean
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
    towers: What both sides read; the item's side needs features that are ids.
    popularity: Sparse feature whose ids rise with the item's popularity.
    cold_below: Items with a smaller id in it get the average.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  popularity: str = "item_positives"
  cold_below: int = 3
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self)


class Model(TowersModel):
  """Two towers; averages stand in for the ids of cold items."""

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
    means = jnp.stack(
      [
        masked_mean(value, batch.id_mask[name]) if value.ndim == 3 else value
        for name, value in rows["average"].items()
      ],
      axis=1,
    )
    average = jax.lax.stop_gradient(means.mean(axis=1))
    item_id = embeddings[two_tower.roles(self.schema)[1]]
    is_cold = batch.ids[config.popularity] < config.cold_below
    mixed = jnp.where(is_cold[:, None], average, item_id)
    scores = self.backbone(encoded, batch, rows, item_id=mixed).scores
    towers = self.backbone(encoded, batch, rows)
    return scores, {
      "sequence": towers.sequence_scores,
      "towers": towers.scores,
      "means": means,
      "item_id": item_id,
    }


STAGES = (
  *two_tower.BACKBONE_STAGES,
  Stage("average", share=0.35, trainable=("average",), initialize_from="best"),
)


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The backbone's tables, and a mean for each value of an item feature."""
  found = two_tower.cold_tables(config, schema)
  ids = {f.name for f in schema.id_features}
  names = [name for name in config.towers.item_features if name in ids]
  if not names:
    raise UserError(
      "model.towers.item_features: none of them is a feature of ids, whose "
      "items could be averaged; name one"
    )
  found["average"] = two_tower.named_table(
    schema, names, config.embed_dim, init_scale=config.embed_init_scale
  )
  return found


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The tasks' losses, and `average`, the squared error of the means."""
  is_warm = batch.ids[config.popularity] >= config.cold_below
  target = jax.lax.stop_gradient(aux["item_id"])
  error = jnp.square(aux["means"].astype(jnp.float32) - target[:, None])
  terms = losses.task_losses(predictions, batch)
  terms["average"] = losses.masked_sum(
    error.sum(axis=(1, 2)), is_warm & batch.example_mask
  )
  return terms
