"""What stands for scenarios and tasks: their priors and first tokens.

Source: MDL, arXiv 2602.07520, eq. 4: s_k = ReLU(FFN_k(e_imp + e_spec)), with
e_imp from extra embedding tables of a few important fields, and e_spec the
priors of scenario k; `+` concatenates. See `recjax.models.mdl`.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.features import pooled_rows
from recjax.layers.grouped import Blocks, GroupedFFN
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table, embedding_table

DOMAIN_TABLE = "domain_embedding"
EVERY, GLOBAL = "all", "global"


@dataclasses.dataclass(frozen=True)
class Prior:
  """Features that some tokens read at their start.

  Attributes:
    token: `all`; or for scenarios the number of one (its row in the
      vocabulary) or `global`, for tasks the name of one.
    features: Id, dense or vector features.
  """

  token: str
  features: tuple[str, ...]


class InitialTokens(nn.Module):
  """The tokens of scenarios and tasks before the first layer.

  Attributes:
    schema: What the batch holds.
    tasks: Names of the tasks.
    important: Features with rows in the extra table; see `important_features`.
    scenario_priors: What scenarios' tokens read beside them.
    task_priors: What tasks' tokens read beside them.
    token_dim: Width of a token, and of the hidden layer.
    use_tasks: Whether there are task tokens.
    use_global: Whether there is a global token.
    dropout_rate: Share of hidden units dropped in training.
    dtype: Type of the computation.
  """

  schema: Schema
  tasks: tuple[str, ...]
  important: tuple[str, ...]
  scenario_priors: tuple[Prior, ...]
  task_priors: tuple[Prior, ...]
  token_dim: int
  use_tasks: bool = True
  use_global: bool = True
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    blocks: Blocks | None,
    *,
    train: bool,
  ) -> tuple[Array | None, Array | None, Array | None]:
    """Tokens of the examples' scenarios, in blocks; global; of the tasks."""
    important = _important_vectors(self.schema, batch, rows, self.important)
    num_scenarios = self.schema.num_scenarios - 1
    names = [str(i + 1) for i in range(num_scenarios)]
    specific = everywhere = tasks = None
    if blocks is not None or self.use_global:
      priors, own = _read_priors(
        self.schema, batch, rows, self.scenario_priors, names, (GLOBAL,)
      )
    if blocks is not None:
      mask = jnp.asarray(own)[jnp.maximum(batch.scenario - 1, 0)]
      inputs = _join(important, priors, mask)
      specific = self._token(
        "specific", num_scenarios, blocks.pack(inputs), train, blocks.group_id
      )
    if self.use_global:
      inputs = _join(important, priors, own[-1:])
      everywhere = self._token("everywhere", 1, inputs[None], train)
    if self.use_tasks:
      priors, own = _read_priors(
        self.schema, batch, rows, self.task_priors, self.tasks
      )
      inputs = jnp.stack([_join(important, priors, mask[None]) for mask in own])
      tasks = self._token("tasks", len(self.tasks), inputs, train)
    return specific, everywhere, tasks

  def _token(self, family: str, num: int, inputs, train: bool, group_id=None):
    token = GroupedFFN(
      num,
      self.token_dim,
      self.token_dim,
      self.dropout_rate,
      self.dtype,
      name=family,
    )(inputs.astype(self.dtype), group_id, train=train)
    # Layers add to the tokens; in few bits the sum would lose what they add.
    return jax.nn.relu(token).astype(jnp.float32)


def important_features(
  schema: Schema, names: Sequence[str] = ()
) -> tuple[str, ...]:
  """The fields that stand for who and what an example is about.

  Args:
    schema: The data's.
    names: Id features; empty for those with the role of user or item, or for
      all id features where there is none.

  Raises:
    UserError: If a name is no id feature.
  """
  known = [feature.name for feature in schema.id_features]
  for name in names:
    if name not in known:
      raise UserError(
        f"model.important_features: {name!r} is no id feature"
        + suggest(name, known)
      )
  roles = [r for r in (schema.roles.user, schema.roles.item) if r in known]
  return tuple(names or roles or known)


def domain_table(
  schema: Schema, names: Sequence[str], dim: int, *, init_scale: float
) -> Table:
  """The extra table of `important_features`."""
  chosen = important_features(schema, names)
  features = tuple(f for f in schema.features if f.name in chosen)
  return embedding_table(
    dataclasses.replace(schema, features=features), dim, init_scale=init_scale
  )


def feature_vectors(
  schema: Schema, batch: Batch, rows: dict[str, Array], names: Sequence[str]
) -> list[Float[Array, "batch width"]]:
  """One vector a named feature: its pooled rows, number or vector.

  Raises:
    UserError: If a name is no id, dense or vector feature.
  """
  pooled = dict(
    zip(
      [f.name for f in schema.id_features],
      pooled_rows(schema, batch, rows),
      strict=True,
    )
  )
  dense = [f.name for f in schema.dense_features]
  vectors = []
  for name in names:
    if name in pooled:
      vectors.append(pooled[name])
    elif name in dense:
      vectors.append(batch.dense[:, dense.index(name), None])
    elif name in batch.vectors:
      vectors.append(batch.vectors[name])
    else:
      raise UserError(
        f"model: a prior names {name!r}, which is no input"
        + suggest(name, [*pooled, *dense, *batch.vectors])
      )
  return vectors


def _important_vectors(schema: Schema, batch: Batch, rows, names):
  chosen = important_features(schema, names)
  features = tuple(f for f in schema.features if f.name in chosen)
  part = dataclasses.replace(schema, features=features)
  vectors = pooled_rows(part, batch, rows[DOMAIN_TABLE])
  return jnp.concatenate(vectors, axis=-1)


def _read_priors(schema, batch, rows, priors, tokens, more=()):
  """All priors side by side, and which columns each token reads."""
  tokens = [*tokens, *more]
  for prior in priors:
    if prior.token not in (EVERY, *tokens):
      raise UserError(
        f"model: a prior is for the token {prior.token!r}"
        + suggest(prior.token, [EVERY, *tokens])
      )
  names = list(dict.fromkeys(n for prior in priors for n in prior.features))
  vectors = feature_vectors(schema, batch, rows["embedding"], names)
  own = [
    np.concatenate(
      [np.zeros(0, bool)]
      + [
        np.full(
          vector.shape[-1],
          any(
            name in prior.features and prior.token in (EVERY, token)
            for prior in priors
          ),
        )
        for name, vector in zip(names, vectors, strict=True)
      ]
    )
    for token in tokens
  ]
  return vectors, np.stack(own)


def _join(important, priors, mask):
  """Important fields, then the priors; zeros where they are not the token's."""
  if not priors:
    return important
  priors = jnp.concatenate(priors, axis=-1)
  return jnp.concatenate([important, jnp.where(mask, priors, 0.0)], axis=-1)
