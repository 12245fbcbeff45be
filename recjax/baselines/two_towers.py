"""SASRec and two linear towers: PROMO's backbone, by itself or tuned on.

Source: the backbone of PROMO (arXiv 2412.18082); SASRec, Kang and McAuley,
arXiv 1808.09781. `layers/two_tower.py` has the equations.

`tune` is what PROMO is compared with:

* `none`: trained in two stages and used as it is ("pre-train");
* `all`: a third stage goes on with all of its weights ("fine-tune").
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import two_tower
from recjax.layers.two_tower import TowersConfig, TowersModel
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table
from recjax.stage import Stage

TUNES = ("none", "all")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of every embedding and vector.
    towers: What both sides read.
    tune: `none`, or `all` for a third stage that trains everything.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  tune: str = "none"
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self)
    if self.tune not in TUNES:
      raise UserError(
        f"unknown model.tune {self.tune!r}" + suggest(self.tune, TUNES)
      )


class Model(TowersModel):
  """User vector times item vector."""

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
    towers = self.backbone(encoded, batch, rows)
    return towers.scores, {
      "sequence": towers.sequence_scores,
      "towers": towers.scores,
      "item": towers.item,
    }


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The history's item table and the towers' table."""
  two_tower.check_towers(config.towers, schema, config.embed_dim)
  return two_tower.tower_tables(
    config.towers, schema, config.embed_dim, init_scale=config.embed_init_scale
  )


loss_fn = losses.plain_loss_fn


def stages(config: Config) -> tuple[Stage, ...]:
  """The backbone's stages, and one more where it is tuned."""
  if config.tune == "none":
    return two_tower.BACKBONE_STAGES
  tune = Stage("tune", share=0.35, initialize_from="best")
  return (*two_tower.BACKBONE_STAGES, tune)
