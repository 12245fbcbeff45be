"""MetaEmb: embeddings for cold ids that are good, and good to learn from.

Source: Pan et al., Warm Up Cold-start Advertisements: Improving CTR Predictions
via Learning to Learn ID Embeddings, SIGIR 2019, arXiv 1904.11547.

| paper | code |
| --- | --- |
| generator h_w(features), a tanh layer | `Generator` |
| phi_init, for an id as if it were new | `generated` |
| l_a on a first minibatch of the id, with phi_init | examples of `first` |
| phi' = phi_init - a grad l_a | `inner_step` |
| l_b on a second minibatch, with phi' | the other examples |
| alpha l_a + (1 - alpha) l_b | `loss_fn` |

The backbone is frozen, as in the paper; it is PROMO's (`layers/two_tower.py`)
where the paper has DeepFM, and so the inner gradient has a closed form: the
residual times what the id's part of the item tower makes of the user. The two
minibatches of an id are its examples in the batch by the parity of their user
(our choice: no example sees its own label, and their order is of no account).
Without a first minibatch phi' is phi_init. Served, items below `cold_below`
have the generated embedding, all others their own. The inner step looks at the
first task.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
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
    inner_learning_rate: Step from the generated embedding, a.
    alpha: Weight of the loss before that step.
    popularity: Sparse feature whose ids rise with the item's popularity.
    cold_below: Items with a smaller id in it get the generated embedding.
    dropout_rate: Share of units dropped in the history's encoder.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  towers: TowersConfig = TowersConfig()
  inner_learning_rate: float = 0.1
  alpha: float = 0.1
  popularity: str = "item_positives"
  cold_below: int = 3
  dropout_rate: float = 0.1
  embed_init_scale: float = 0.05
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self, inner_learning_rate=0)
    if not 0 <= self.alpha <= 1:
      raise UserError(f"model.alpha must lie in [0, 1], got {self.alpha}")


class Model(TowersModel):
  """Two towers; cold items have generated ids."""

  def setup(self):
    super().setup()
    self.generator = Generator(
      self.config.embed_dim, jnp.dtype(self.config.dtype)
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
    config, embeddings = self.config, rows["embedding"]
    user, item = two_tower.roles(self.schema)
    towers = self.backbone(encoded, batch, rows)
    aux = {"sequence": towers.sequence_scores, "towers": towers.scores}
    features = two_tower.concat_named(
      self.schema, config.towers.item_features, batch, embeddings
    )
    generated = self.generator(features)
    if not train:
      is_cold = batch.ids[config.popularity] < config.cold_below
      item_id = jnp.where(is_cold[:, None], generated, embeddings[item])
      return self.backbone(encoded, batch, rows, item_id=item_id).scores, aux
    as_new = self.backbone(encoded, batch, rows, item_id=generated)
    task = config.tasks[0]
    first = batch.ids[user] % 2 == 0
    kernel = self.backbone.variables["params"]["item"]["kernel"]
    stepped = inner_step(
      generated,
      residual(as_new.scores[task], task, batch),
      as_new.user[task].astype(jnp.float32) @ kernel[: config.embed_dim].T,
      batch.ids[item],
      first & batch.label_mask[task] & batch.example_mask,
      config.inner_learning_rate,
    )
    warmed = self.backbone(encoded, batch, rows, item_id=stepped)
    return as_new.scores, aux | {"warmed": warmed.scores, "first": first}


class Generator(nn.Module):
  """`scale * tanh(W features + b)`.

  Attributes:
    dim: Width of an embedding.
    dtype: Type of the computation.
  """

  dim: int
  dtype: Any

  @nn.compact
  def __call__(
    self, features: Float[Array, "batch width"]
  ) -> Float[Array, "batch dim"]:
    x = nn.tanh(nn.Dense(self.dim, dtype=self.dtype, name="dense")(features))
    scale = self.param("scale", nn.initializers.ones, (1, 1))
    return x.astype(jnp.float32) * scale


STAGES = (
  *two_tower.BACKBONE_STAGES,
  Stage(
    "generator",
    share=0.35,
    trainable=("generator/.*",),
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
  """`alpha` times the first minibatches' losses, the rest the others'."""
  terms = {}
  for task, scores in predictions.items():
    parts = []
    for which, part in ((scores, aux["first"]), (aux["warmed"][task], None)):
      part = ~aux["first"] if part is None else part
      mask = batch.label_mask | {task: batch.label_mask[task] & part}
      parts.append(
        losses.task_losses({task: which}, batch.replace(label_mask=mask))[task]
      )
    total = config.alpha * parts[0][0] + (1 - config.alpha) * parts[1][0]
    terms[task] = (total, parts[0][1] + parts[1][1])
  return terms


def residual(
  scores: Float[Array, " batch"], task: str, batch: Batch
) -> Float[Array, " batch"]:
  """Derivative of each example's loss by its score; 0 without a label."""
  mask = batch.label_mask[task] & batch.example_mask
  labels = jnp.where(mask, batch.labels[task], 0.0)
  if task in batch.real_labels:
    loss = lambda s: jnp.sum(jnp.square(s - losses.symlog(labels)))  # noqa: E731
  else:
    loss = lambda s: jnp.sum(  # noqa: E731
      optax.losses.sigmoid_binary_cross_entropy(s, labels)
    )
  return jnp.where(mask, jax.grad(loss)(scores), 0.0)


def inner_step(
  embedding: Float[Array, "batch dim"],
  residuals: Float[Array, " batch"],
  directions: Float[Array, "batch dim"],
  item: Int[Array, " batch"],
  is_first: Bool[Array, " batch"],
  learning_rate: float,
) -> Float[Array, "batch dim"]:
  """One step on each item's embedding by its own first examples.

  Args:
    embedding: Of each example's item; the same for one item.
    residuals: Derivative of an example's loss by its score.
    directions: Derivative of its score by the embedding.
    item: Which item an example is about.
    is_first: Examples of the first minibatches.
    learning_rate: Step along the mean gradient.
  """
  gradients = residuals[:, None] * directions
  same = (item[:, None] == item[None]) & is_first[None]
  weights = same.astype(embedding.dtype)
  weights /= jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
  return embedding - learning_rate * (weights @ gradients)
