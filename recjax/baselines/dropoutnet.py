"""DropoutNet: towers that learn to do without the ids of cold items.

Source: Volkovs, Yu and Poutanen, DropoutNet: Addressing Cold Start in
Recommender Systems, NeurIPS 2017.

| paper | code |
| --- | --- |
| preference input of an item, set to 0 at random | `keep_id` in training |
| cold items at inference: preference input 0 | `keep_id`, `cold_below` |

Departures: the preference input is the id's embedding, trained along, on the
backbone of PROMO (`layers/two_tower.py`), and the loss is that of the labels;
the paper regresses the scores of a given factorisation. Items alone are
dropped: users are warm in what it is compared on.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import two_tower
from recjax.layers.two_tower import TowersConfig, TowersModel


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of every embedding and vector.
    towers: What both sides read; the item's side needs features.
    id_dropout_rate: Share of examples whose item id is dropped in training.
    popularity: Sparse feature whose ids rise with the item's popularity.
    cold_below: Items with a smaller id in it are served without their id.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  id_dropout_rate: float = 0.5
  popularity: str = "item_positives"
  cold_below: int = 3
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self)
    if not 0 <= self.id_dropout_rate < 1:
      raise UserError(
        f"model.id_dropout_rate must lie in [0, 1), got {self.id_dropout_rate}"
      )


class Model(TowersModel):
  """Two towers, the item's without its id at random or where it is cold."""

  def decode(
    self,
    encoded: Float[Array, "users dim"],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions; `encoded` is of each example, or of one user for all."""
    config = self.config
    if train:
      rate, rng = config.id_dropout_rate, None
      if rate:
        rng = self.make_rng("dropout")
      keep = keep_id(rng, batch.size, rate)
    else:
      keep = batch.ids[config.popularity] >= config.cold_below
    item_id = rows["embedding"][two_tower.roles(self.schema)[1]]
    item_id = jnp.where(keep[:, None], item_id, 0.0)
    towers = self.backbone(encoded, batch, rows, item_id=item_id)
    return towers.scores, {
      "sequence": towers.sequence_scores,
      "towers": towers.scores,
    }


STAGES = two_tower.BACKBONE_STAGES


tables = two_tower.cold_tables


loss_fn = losses.plain_loss_fn


def keep_id(rng: Array | None, size: int, rate: float) -> Bool[Array, " batch"]:
  """Examples that keep the id of their item, a share of `1 - rate`."""
  if not rate:
    return jnp.ones(size, bool)
  return jax.random.bernoulli(rng, 1.0 - rate, (size,))
