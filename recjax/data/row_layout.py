"""Which 32-bit words of the prepared store hold what."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from recjax.batch import TrialRows
from recjax.schema import Schema

GROUPS = ("group", "query")


@dataclasses.dataclass
class Block:
  """Some rows on their way into the store, `n` in every array.

  Attributes:
    dense: Raw values, columns in the order of `Schema.dense_features`.
    ids: Single-valued id feature -> row of its vocabulary.
    lists: Sequence, multi-valued or text feature -> start and length of each
      row's slice of the values given to `ColumnWriter.append_values`, oldest
      first.
    vectors: Vector feature -> its values.
    labels: Label -> outcome, NaN where missing.
    groups: `"group"` and `"query"`, where the data has them -> any numbers
      that tell the groups apart.
    time: Each example's own time in seconds; only where the schema has event
      times.
    trial: What was drawn and seen; only where the schema has a trial.
  """

  dense: Float[np.ndarray, "n num_dense"]
  ids: dict[str, Int[np.ndarray, " n"]]
  lists: dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]
  vectors: dict[str, Float[np.ndarray, "n dim"]]
  labels: dict[str, Float[np.ndarray, " n"]]
  groups: dict[str, Int[np.ndarray, " n"]]
  time: Float[np.ndarray, " n"] | None = None
  trial: TrialRows | None = None

  def take(self, chosen: Shaped[np.ndarray, " m"]) -> "Block":
    """The rows at `chosen`, their numbers or a mask."""

    def take(arrays):
      return {name: array[chosen] for name, array in arrays.items()}

    return Block(
      dense=self.dense[chosen],
      ids=take(self.ids),
      lists={
        name: (starts[chosen], lengths[chosen])
        for name, (starts, lengths) in self.lists.items()
      },
      vectors=take(self.vectors),
      labels=take(self.labels),
      groups=take(self.groups),
      time=None if self.time is None else self.time[chosen],
      trial=jax.tree.map(lambda array: array[chosen], self.trial),
    )


class RowLayout:
  """Which 32-bit words of a row hold what."""

  def __init__(self, schema: Schema):
    self.lists = [f for f in schema.features if f.is_list]
    self.single = [f for f in schema.id_features if not f.is_list]
    self.vectors = list(schema.vector_features)
    self.labels = list(schema.labels)
    self.num_words = 0
    self.starts = self._words(2 * len(self.lists))
    self.lengths = self._words(len(self.lists))
    self.ids = self._words(len(self.single))
    self.groups = self._words(len(GROUPS))
    self.dense = self._words(len(schema.dense_features))
    self.outcomes = self._words(len(self.labels))
    self.vector_parts = [self._words(f.dim) for f in self.vectors]
    self.has_time = any(f.time is not None for f in self.lists)
    self.time = self._words(2 * self.has_time)
    self.has_trial = schema.trial is not None
    self.trial = self._words(5 * self.has_trial)
    # List feature -> words of an entry, and which of them hold which ids.
    self.entry_words, self.id_words = {}, {}
    for feature in self.lists:
      names = [feature.name, *(f.name for f in schema.sides(feature))]
      first = 2 * (feature.time is not None)
      self.id_words[feature.name] = {
        name: first + i for i, name in enumerate(names)
      }
      self.entry_words[feature.name] = first + len(names)

  def _words(self, count: int) -> slice:
    self.num_words += count
    return slice(self.num_words - count, self.num_words)

  def parts(self):
    """What makes two layouts equal."""
    kinds = (self.lists, self.single, self.vectors, self.labels)
    names = [[entry.name for entry in kind] for kind in kinds]
    return names, self.num_words, self.entry_words, self.id_words

  def pack(self, block: Block) -> Int[np.ndarray, "n num_words"]:
    num_rows = len(block.dense)
    rows = np.zeros((num_rows, self.num_words), "<i4")
    floats = rows.view("<f4")
    floats[:, self.dense] = block.dense
    for i, feature in enumerate(self.lists):
      starts, lengths = block.lists[feature.name]
      word = self.starts.start + 2 * i
      rows[:, word : word + 2] = (
        np.ascontiguousarray(starts, "<i8").view("<i4").reshape(-1, 2)
      )
      rows[:, self.lengths.start + i] = lengths
    for i, feature in enumerate(self.single):
      rows[:, self.ids.start + i] = block.ids[feature.name]
    for name, values in block.groups.items():
      rows[:, self.groups.start + GROUPS.index(name)] = values
    for i, label in enumerate(self.labels):
      floats[:, self.outcomes.start + i] = block.labels[label.name]
    for feature, part in zip(self.vectors, self.vector_parts, strict=True):
      floats[:, part] = block.vectors[feature.name]
    if self.has_time:
      rows[:, self.time] = _words_of(block.time)
    if self.has_trial:
      trial, first = block.trial, self.trial.start
      rows[:, first] = trial.treatment
      rows[:, first + 1] = trial.cluster
      numbers = (trial.response, trial.cost, trial.propensity)
      floats[:, first + 2 : first + 5] = np.stack(numbers, axis=1)
    return rows

  def unpack_trial(self, rows: Int[np.ndarray, "n num_words"]) -> TrialRows:
    """What `pack` made of `Block.trial`."""
    words = np.ascontiguousarray(rows[:, self.trial].T)
    response, cost, propensity = words[2:].view("<f4")
    return TrialRows(
      treatment=words[0],
      response=response,
      cost=cost,
      propensity=propensity,
      cluster=words[1],
    )

  def pack_values(
    self, feature: str, values, time, sides
  ) -> Int[np.ndarray, "values words"]:
    """The entries of a list feature; see `ColumnWriter.append_values`."""
    names = self.id_words[feature]
    if {feature, *sides} != set(names):
      raise ValueError(
        f"feature {feature!r}: got sides {sorted(sides)}, the schema has "
        f"{list(names)[1:]}"
      )
    columns = [values, *sides.values(), *([] if time is None else [time])]
    if {len(column) for column in columns} != {len(values)}:
      raise ValueError(
        f"feature {feature!r}: values, times and sides have lengths "
        f"{[len(column) for column in columns]}"
      )
    entries = np.zeros((len(values), self.entry_words[feature]), "<i4")
    if (time is None) == (len(names) < entries.shape[1]):
      raise ValueError(
        f"feature {feature!r}: times must be given if, and only if, the "
        "schema names them"
      )
    if time is not None:
      if not np.isfinite(time).all():
        raise ValueError(f"feature {feature!r}: times must be finite")
      entries[:, :2] = _words_of(time)
    for name, word in names.items():
      entries[:, word] = values if name == feature else sides[name]
    return entries


def _words_of(time: Float[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
  return np.ascontiguousarray(time, "<f8").view("<i4").reshape(-1, 2)
