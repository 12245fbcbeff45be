"""PPR: a prefix made from the user's profile, before a frozen history encoder.

Source: Wu et al., Personalized Prompts for Sequential Recommendation,
arXiv 2205.09666.

| paper | code |
| --- | --- |
| personalised prompt from user profiles, an MLP | `Prefix` |
| prompt before the behaviours, pre-trained model frozen | `encode_user` |
| light version: prompts alone are tuned | third of `STAGES` |

Departures: the pre-trained model is PROMO's backbone (`layers/two_tower.py`),
whose user vector is a mean: prefix positions count in it (our choice). The
contrastive losses on augmented prompts and behaviours are left out.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
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
    towers: What both sides read; the user's side needs features.
    num_prefix: Vectors put before the history.
    hidden_dim: Hidden units between profile and prefix.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  num_prefix: int = 1
  hidden_dim: int = 32
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self, num_prefix=1, hidden_dim=1)


class Model(TowersModel):
  """Two towers; the history's encoder sees the profile first."""

  def setup(self):
    super().setup()
    config = self.config
    self.prefix = Prefix(
      config.num_prefix,
      config.embed_dim,
      config.hidden_dim,
      jnp.dtype(config.dtype),
    )

  @property
  def encoded_features(self) -> tuple[str, ...]:
    """What `encode_user` reads."""
    return (self.config.towers.history, *self.config.towers.user_features)

  def encode_user(
    self,
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "batch dim"], Float[Array, "batch dim"]]:
    """The history's vector with and without the prefix."""
    towers = self.config.towers
    profile = two_tower.concat_named(
      self.schema, towers.user_features, batch, rows["embedding"]
    )
    events = rows["sequence"][towers.history]
    mask = batch.id_mask[towers.history]
    return (
      self.sequence_encoder(
        events, mask, train=train, prefix=self.prefix(profile)
      ),
      self.sequence_encoder(events, mask, train=train),
    )

  def decode(
    self,
    encoded: tuple[Float[Array, "users dim"], Float[Array, "users dim"]],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions; `encoded` is of each example, or of one user for all."""
    del train
    prompted, plain = encoded
    towers = self.backbone(plain, batch, rows)
    return self.backbone(prompted, batch, rows).scores, {
      "sequence": towers.sequence_scores,
      "towers": towers.scores,
    }


class Prefix(nn.Module):
  """One hidden layer from a profile to some vectors.

  Attributes:
    num_prefix: Vectors.
    dim: Their width.
    hidden_dim: Hidden units.
    dtype: Type of the computation.
  """

  num_prefix: int
  dim: int
  hidden_dim: int
  dtype: Any

  @nn.compact
  def __call__(
    self, profile: Float[Array, "batch width"]
  ) -> Float[Array, "batch num_prefix dim"]:
    x = nn.Dense(self.hidden_dim, dtype=self.dtype, name="hidden")(profile)
    x = nn.Dense(self.num_prefix * self.dim, dtype=self.dtype, name="out")(
      nn.gelu(x)
    )
    return x.reshape(-1, self.num_prefix, self.dim)


STAGES = (
  *two_tower.BACKBONE_STAGES,
  Stage("prefix", share=0.35, trainable=("prefix/.*",), initialize_from="best"),
)


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The backbone's tables."""
  two_tower.check_towers(config.towers, schema, config.embed_dim)
  if not config.towers.user_features:
    raise UserError(
      "model.towers.user_features is empty: the prefix is made from the "
      "user's profile; name some features"
    )
  return two_tower.tower_tables(
    config.towers, schema, config.embed_dim, init_scale=config.embed_init_scale
  )


loss_fn = losses.plain_loss_fn
