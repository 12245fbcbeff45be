"""PROMO: prompts for cold items, from the users who liked them best.

Source: PROMO, arXiv 2412.18082 (RecSys 2024); where the paper is silent, the
configuration that its authors released.

| paper | code |
| --- | --- |
| stage 1, SASRec; stage 2, two towers; stage 3, PROMO | `STAGES` |
| frozen backbone: user, item, score = user . item | `layers/two_tower.py` |
| prompt item table e_i, prompt user table f_u | `prompt_item`, `prompt_user` |
| prompt_i, theta_i, phi_i(u), s+ and s- | `layers/prompt.py` |
| item' = W [item; s+; prompt_i], score = user . item' | `Model` |
| L_rec, cross entropy over positives and negatives | term of each task |
| L_pfpe = softplus(-(n- s+ - n+ s-)) | `feedback_enhancement` |
| L_pape = softplus(-(n_h sum cold+ - n_c sum popular-)) | `item_enhancement` |
| lambda_1, lambda_2 | `pfpe_weight`, `pape_weight` |
| PROMO-I, -F, -IF | `prompt_from`: `id`, `features`, `id_features` |
| PROMO-M, -T | `network`: `shared`, `none` |

The lists come with the data (`recjax.data.feedback`); the score alpha * stay +
beta * interaction and the k users kept are the adapter's. An item is popular
from bucket `popular_from` of `popularity` on: 50 positives, as released.

Departures:
* Lists and histories hold strictly earlier events and never the row's user.
* Pseudo-pinnacle feedback, users borrowed from similar popular items, comes
  with the data too and is off, as the released code has none; see
  `recjax.data.pseudo_feedback`.
* `fusion="identity"` starts stage 3 at the backbone: W is the identity on the
  item's vector. Released: Xavier, so that stage 3 first forgets it.
* `normalization="mean"` divides the brackets by n+ n- and n_c n_h; released:
  `sum`, whose size grows with the lists and with the batch.
* Each stage keeps its best evaluation, the next begins there. Released too;
  without an early stop the released run collapses in its last epochs.
* Under `pmap` L_pape sees each device's part of the batch.

Not stated: what to do with several labels. Both extra losses look at the
first; the others share item' and have a user vector each.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import prompt as prompt_lib
from recjax.layers import two_tower
from recjax.layers.prompt import PromptNetwork
from recjax.layers.two_tower import TowersConfig, TowersModel, dot
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table
from recjax.stage import Stage

_CHOICES = {
  "prompt_from": ("feedback", "id", "features", "id_features"),
  "network": prompt_lib.NETWORKS,
  "pooling": prompt_lib.POOLINGS,
  "normalization": ("sum", "mean"),
  "prompt_tables": ("own", "backbone"),
  "fusion": ("identity", "xavier"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network and weights of the losses.

  Attributes:
    tasks: Labels to predict; cold and popular items are told by the first.
    embed_dim: Width of every embedding, vector and prompt.
    towers: The backbone; its feature names must be those of the data.
    positive_list: List of users with the best feedback on the item.
    negative_list: Of users with negative feedback; for a loss alone.
    popularity: Sparse feature whose ids rise with the item's popularity.
    popular_from: Ids from this one on are popular items; below are cold ones.
    prompt_from: What the item's network reads: `feedback`, the users; `id`,
      `features`, `id_features`: the item's own (ablations).
    network: `generated` for each item, `shared` by all, or `none`.
    hidden_dim: Hidden units of an item's network.
    use_relu: Whether a ReLU stands between its layers.
    pooling: `sum` of the users' vectors, or `mean`.
    prompt_tables: `own` embeddings of items and users for the prompts, or the
      frozen ones of the `backbone`, which leaves few weights to tune.
    fusion: Start of the last layer: `identity` on the backbone, or `xavier`.
    normalization: Of the brackets in both extra losses: `sum` or `mean`.
    pfpe_weight: Weight of the loss over an item's feedback.
    pape_weight: Weight of the loss over the batch's items.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  positive_list: str = "pinnacle_users"
  negative_list: str = "negative_users"
  popularity: str = "item_positives"
  popular_from: int = 5
  prompt_from: str = "feedback"
  network: str = "generated"
  hidden_dim: int = 16
  use_relu: bool = False
  pooling: str = "sum"
  prompt_tables: str = "own"
  fusion: str = "identity"
  normalization: str = "sum"
  pfpe_weight: float = 0.01
  pape_weight: float = 0.01
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self, hidden_dim=1, pfpe_weight=0, pape_weight=0)
    for name, allowed in _CHOICES.items():
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"unknown model.{name} {value!r}" + suggest(value, allowed)
        )


class Model(TowersModel):
  """Two towers, and the item's vector extended by its prompts."""

  def setup(self):
    super().setup()
    config = self.config
    dim, dtype = config.embed_dim, jnp.dtype(config.dtype)
    self.prompt = PromptNetwork(
      dim,
      config.hidden_dim,
      config.network,
      config.use_relu,
      config.pooling,
      dtype,
    )
    if "features" in config.prompt_from:
      self.content = nn.Dense(dim, dtype=dtype)
    self.fuse = Fusion(dim, config.fusion, dtype)

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
    towers = self.backbone(encoded, batch, rows)
    users, mask = self._content(batch, rows)
    negatives, negative_mask = None, None
    if train and config.prompt_from == "feedback":  # For the loss alone.
      negatives = _list_rows(config, rows)[config.negative_list]
      negative_mask = batch.id_mask[config.negative_list]
    prompts = self.prompt(
      None if config.network == "none" else self._item_id(rows),
      users=users,
      mask=mask,
      negatives=negatives,
      negative_mask=negative_mask,
    )
    item = self.fuse(towers.item, prompts.concat())
    predictions = {t: dot(user, item) for t, user in towers.user.items()}
    return predictions, {
      "sequence": towers.sequence_scores,
      "towers": towers.scores,
      "item": item,
      "prompts": prompts,
    }

  def _item_id(self, rows) -> Float[Array, "batch dim"]:
    own = self.config.prompt_tables == "own"
    item = two_tower.roles(self.schema)[1]
    return rows["prompt_item" if own else "embedding"][item]

  def _content(self, batch: Batch, rows):
    """What the item's network reads, and which of it counts."""
    config = self.config
    if config.prompt_from == "feedback":
      name = config.positive_list
      return _list_rows(config, rows)[name], batch.id_mask[name]
    parts = []
    if "id" in config.prompt_from.split("_"):
      parts.append(self._item_id(rows))
    if "features" in config.prompt_from:
      values = two_tower.concat_named(
        self.schema, config.towers.item_features, batch, rows["embedding"]
      )
      parts.append(self.content(values))
    content = jnp.stack([x.astype(config.dtype) for x in parts], axis=1)
    return content, jnp.ones(content.shape[:2], bool)


class Fusion(nn.Module):
  """`W [item; prompts]`, without a bias.

  Attributes:
    dim: Width of the result.
    start: `identity`: W begins as the identity on the item and Xavier-normal
      on the prompts; `xavier`: all of it is Xavier-normal.
    dtype: Type of the computation.
  """

  dim: int
  start: str = "identity"
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, item: Float[Array, "batch dim"], prompts: Float[Array, "batch width"]
  ) -> Float[Array, "batch dim"]:
    def init(rng, shape, dtype):
      kernel = nn.initializers.xavier_normal()(rng, shape, dtype)
      if self.start == "identity":
        kernel = kernel.at[: self.dim].set(jnp.eye(self.dim, dtype=dtype))
      return kernel

    return nn.Dense(
      self.dim,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=init,
      name="dense",
    )(jnp.concatenate([item, prompts], axis=-1))


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The backbone's tables, and those of the prompts where they have own ones.

  Raises:
    UserError: If a feature that the config names is not in the data.
  """
  two_tower.check_towers(config.towers, schema, config.embed_dim)
  lists = ()
  if config.prompt_from == "feedback":
    lists = (config.positive_list, config.negative_list)
    for key, name in zip(("positive", "negative"), lists, strict=True):
      two_tower.list_feature(schema, name, f"model.{key}_list")
  if "features" in config.prompt_from and not config.towers.item_features:
    raise UserError(
      f"model.prompt_from {config.prompt_from!r} needs item features; name "
      "them in model.towers.item_features"
    )
  two_tower.check_popularity(schema, config.popularity)
  own = config.prompt_tables == "own"
  found = two_tower.tower_tables(
    config.towers,
    schema,
    config.embed_dim,
    init_scale=config.embed_init_scale,
    lists=() if own else lists,
  )
  scale = {"init_scale": config.embed_init_scale}
  # Without a network nothing is generated from the item.
  if own and (config.network != "none" or "id" in config.prompt_from):
    item = two_tower.roles(schema)[1]
    found["prompt_item"] = two_tower.named_table(
      schema, (item,), config.embed_dim, **scale
    )
  if own and lists:
    found["prompt_user"] = two_tower.named_table(
      schema, lists, config.embed_dim, **scale
    )
  return found


def _list_rows(config: Config, rows):
  return rows["prompt_user" if config.prompt_tables == "own" else "embedding"]


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """Stage 3: the tasks' losses, `pfpe` and `pape`."""
  terms = losses.task_losses(predictions, batch)
  prompts = aux["prompts"]
  if prompts.negative is not None and config.pfpe_weight:
    total, weight = feedback_enhancement(
      prompts,
      batch.id_mask[config.positive_list],
      batch.id_mask[config.negative_list],
      batch.example_mask,
      config.pooling,
      config.normalization,
    )
    terms["pfpe"] = (config.pfpe_weight * total, weight)
  task = config.tasks[0]
  if config.pape_weight and task not in batch.real_labels:
    total, weight = item_enhancement(
      predictions[task],
      batch.labels[task],
      batch.label_mask[task] & batch.example_mask,
      batch.ids[config.popularity] >= config.popular_from,
      config.normalization,
    )
    terms["pape"] = (config.pape_weight * total, weight)
  return terms


STAGES = (
  *two_tower.BACKBONE_STAGES,
  Stage(
    "promo",
    share=0.35,
    trainable=("prompt_.*", "prompt/.*", "content/.*", "fuse/.*"),
    initialize_from="best",
  ),
)


def feedback_enhancement(
  prompts: prompt_lib.Prompts,
  positive_mask: Bool[Array, "batch max_len"],
  negative_mask: Bool[Array, "batch other_len"],
  example_mask: Bool[Array, " batch"],
  pooling: str = "sum",
  normalization: str = "sum",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """L_pfpe: sum over examples and dimensions, and the number of examples.

  `softplus(-bracket)`, where the bracket is `n- s+ - n+ s-`: the sum of
  `phi(u+) - phi(u-)` over all pairs of an item's positive and negative users.
  """
  counts = [
    mask.sum(axis=-1, keepdims=True).astype(jnp.float32)
    for mask in (positive_mask, negative_mask)
  ]
  positive, negative = (
    x.astype(jnp.float32) for x in (prompts.positive, prompts.negative)
  )
  if pooling == "mean":
    positive, negative = positive * counts[0], negative * counts[1]
  bracket = counts[1] * positive - counts[0] * negative
  if normalization == "mean":
    bracket /= jnp.maximum(counts[0] * counts[1], 1.0)
  return losses.masked_sum(jax.nn.softplus(-bracket).sum(axis=-1), example_mask)


def item_enhancement(
  scores: Float[Array, " batch"],
  labels: Float[Array, " batch"],
  mask: Bool[Array, " batch"],
  is_popular: Bool[Array, " batch"],
  normalization: str = "sum",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """L_pape of a batch: one number, of weight 1.

  `softplus(-bracket)`, where the bracket is the sum of `score_c - score_h`
  over all pairs of a cold positive c and a popular negative h. A batch without
  a pair weighs nothing (released: log 2, without a gradient).
  """
  positive = labels > 0.5
  cold, hot = mask & positive & ~is_popular, mask & ~positive & is_popular
  num_cold, num_hot = (x.sum().astype(jnp.float32) for x in (cold, hot))
  bracket = num_hot * jnp.sum(jnp.where(cold, scores, 0.0))
  bracket -= num_cold * jnp.sum(jnp.where(hot, scores, 0.0))
  num_pairs = num_cold * num_hot
  if normalization == "mean":
    bracket /= jnp.maximum(num_pairs, 1.0)
  weight = (num_pairs > 0).astype(jnp.float32)
  return weight * jax.nn.softplus(-bracket), weight
