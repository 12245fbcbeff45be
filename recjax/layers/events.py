"""From the sequences of a batch to the vectors of their events.

Sources: Chai et al., LONGER, arXiv 2505.04421 (the time since an event beside
its item, a learned absolute position); HyFormer, arXiv 2601.12681 (several
kinds of side information an event).

Nothing but the sequences, their sides and their times is read here, so that
what follows knows nothing of the candidate.

Our choice: times enter as log(1 + seconds), that since the event and that to
the event after it, with `NUM_HINGES` learned hinges each, so that one linear
map can bend them; positions are counted from the most recent event; one linear
map, its bias, and the position's vector make an event.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from recjax.batch import Batch
from recjax.errors import UserError
from recjax.schema import Feature, Schema

NUM_HINGES = 8
# About the logarithm of a year in seconds.
_LOG_SCALE = 16.0


class Events(NamedTuple):
  """The events of one sequence, the most recent at the end.

  Attributes:
    vectors: `[users, length, dim]`; zeros where there is no event.
    mask: True for events; they come last.
    age: Seconds since each, where the schema names their times.
  """

  vectors: Float[Array, "users length dim"]
  mask: Bool[Array, "users length"]
  age: Float[Array, "users length"] | None


class EventEmbedding(nn.Module):
  """The events of every sequence of a schema.

  Attributes:
    schema: What the batch holds.
    dim: Width of an event's vector.
    dtype: Type of the vectors.
  """

  schema: Schema
  dim: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, batch: Batch, rows: dict[str, Array]) -> dict[str, Events]:
    """Sequence -> its events.

    Args:
      batch: Users; nothing else of it is looked at.
      rows: Feature name -> embeddings of its ids.
    """
    return {
      feature.name: self._embed(feature, batch, rows)
      for feature in self.schema.sequences
    }

  def _embed(self, feature: Feature, batch: Batch, rows) -> Events:
    name, mask = feature.name, batch.id_mask[feature.name]
    length = mask.shape[1]
    columns = [feature, *self.schema.sides(feature)]
    parts = [rows[column.name] for column in columns]
    age = batch.event_age.get(name)
    if age is not None:
      age = jnp.where(mask, age, 0.0)
      parts.append(self._time_features(name, age, mask))
    features = jnp.concatenate(parts, axis=-1).astype(self.dtype)
    vectors = nn.Dense(self.dim, dtype=self.dtype, name=name)(features)
    vectors = align_last(vectors, mask)
    position = self.param(
      f"{name}_position",
      nn.initializers.normal(0.02),
      (feature.max_len, self.dim),
    ).astype(self.dtype)
    # Row 0 is the most recent event's; a batch may be cut to less of them.
    vectors += position[:length][::-1][None]
    age = None if age is None else align_last(age, mask)
    mask = align_last(mask, mask)
    return Events(jnp.where(mask[..., None], vectors, 0.0), mask, age)

  def _time_features(
    self,
    name: str,
    age: Float[Array, "users length"],
    mask: Bool[Array, "users length"],
  ) -> Float[Array, "users length times"]:
    following = jnp.pad(age[:, 1:], ((0, 0), (0, 1)))
    gap = jnp.where(mask, jnp.maximum(age - following, 0.0), 0.0)
    times = jnp.log1p(jnp.stack([age, gap], axis=-1)) / _LOG_SCALE
    shape = (2, NUM_HINGES)
    # Knots spread over the range that a log time takes.
    slope = self.param(f"{name}_slope", nn.initializers.normal(2.0), shape)
    knots = self.param(f"{name}_knots", nn.initializers.normal(1.0), shape)
    hinges = nn.relu(times[..., None] * slope[None, None] + knots[None, None])
    return jnp.concatenate(
      [times, hinges.reshape(*age.shape, 2 * NUM_HINGES)], axis=-1
    )


def align_last(
  x: Shaped[Array, "users length ..."], mask: Bool[Array, "users length"]
) -> Shaped[Array, "users length ..."]:
  """Moves the valid positions, which come first, to the end."""
  length = mask.shape[1]
  shift = length - mask.sum(axis=-1, keepdims=True)
  source = (jnp.arange(length)[None] - shift) % length
  source = source.reshape(*source.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, source, axis=1)


def merge_events(
  events: dict[str, Events], kinds: Float[Array, "sequences dim"]
) -> Events:
  """All sequences as one, in the order of time.

  Where a sequence has no times, events are ordered by how many of their own
  sequence came after them (our choice).

  Args:
    events: Sequences.
    kinds: A vector for each, added to its events.
  """
  parts = list(events.values())
  vectors = jnp.concatenate(
    [part.vectors + kinds[i][None, None] for i, part in enumerate(parts)],
    axis=1,
  )
  mask = jnp.concatenate([part.mask for part in parts], axis=1)
  ages = [part.age for part in parts]
  timed = all(age is not None for age in ages)
  if not timed:
    ages = [
      jnp.broadcast_to(jnp.arange(m.shape[1])[::-1][None] * 1.0, m.shape)
      for m in (part.mask for part in parts)
    ]
  age = jnp.where(mask, jnp.concatenate(ages, axis=1), jnp.inf)
  order = jnp.argsort(-age, axis=1, stable=True)
  take = lambda x: jnp.take_along_axis(  # noqa: E731
    x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1
  )
  mask = take(mask)
  vectors = jnp.where(mask[..., None], take(vectors), 0.0)
  return Events(vectors, mask, jnp.where(mask, take(age), 0.0))


def pooled_events(events: Events) -> Float[Array, "users dim"]:
  """Mean of the events; zeros where there is none."""
  count = jnp.maximum(events.mask.sum(axis=-1, keepdims=True), 1)
  return events.vectors.sum(axis=1) / count.astype(events.vectors.dtype)


def repeat_users(
  x: Shaped[Array, "users ..."], batch_size: Any
) -> Shaped[Array, "batch ..."]:
  """A user's values for each of its examples, which follow each other.

  Args:
    x: One entry a user.
    batch_size: Number of examples; a symbol where a program is exported.
  """
  users = x.shape[0]
  if users == batch_size:
    return x
  return jnp.repeat(x, batch_size // users, axis=0)


def without_sequences(schema: Schema) -> Schema:
  """The schema without its sequences and their sides.

  For the layers that take all features of a schema, where a model reads the
  sequences in a way of its own.
  """
  kept = tuple(f for f in schema.features if f.kind != "sequence")
  return Schema(
    kept, schema.labels, schema.roles, schema.split, schema.vocab_sizes
  )


def require_sequences(schema: Schema, model: str) -> tuple[Feature, ...]:
  """The sequences of a schema.

  Raises:
    UserError: If there is none.
  """
  if not schema.sequences:
    raise UserError(
      f"model {model!r} reads sequences and the data has none; give a feature "
      "of kind 'sequence' to its schema"
    )
  return schema.sequences


def target_features(schema: Schema, names: tuple[str, ...]) -> tuple[str, ...]:
  """The single-valued id features that say what is to be scored.

  Args:
    schema: What the data holds.
    names: Those that the config names; none: the one with the role `item`.

  Raises:
    UserError: If there is no such feature, or none has the role.
  """
  if not names and schema.roles.item is None:
    raise UserError(
      "model.target_features is empty and no feature has the role 'item'; "
      "name the features of the candidate, or give the role in the schema"
    )
  names = names or (schema.roles.item,)
  for name in names:
    feature = schema.feature(name)
    if not feature.is_id or feature.is_list:
      raise UserError(
        f"model.target_features: {name!r} must be a single-valued sparse "
        "feature"
      )
  return names
