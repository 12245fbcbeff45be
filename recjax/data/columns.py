"""The prepared data set: a memory-mapped store of fixed-size rows.

Reading a shuffled batch means jumping to as many places on disk as the batch
has rows, so everything that belongs to one row lies in one place:

```
manifest.json    format, schema, row counts, mean and std of dense columns
train.rows       [num_rows, words] of little-endian 32-bit words; also
valid.rows       a row: list starts (64 bit), list lengths, ids, groups,
test.rows        dense, labels (NaN = missing), vectors
values_0.i32     ids of the first list feature, then max_len zeros; also
values_1.i32     a row's list is a slice, and slices may overlap
```

Lists are slices so that a user's history is stored once and not once a row.
Dense columns are stored raw and standardised when read, with the training
part's mean and standard deviation.
"""

import dataclasses
import json

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from recjax.batch import Batch
from recjax.data.mapped_rows import MappedRows, Resident
from recjax.errors import UserError
from recjax.schema import SPLITS, Feature, Schema

FORMAT = 1
DENSE_LIMIT = 10.0  # Standardised values are clipped to +-DENSE_LIMIT.
GROUPS = ("group", "query")
_RESIDENT_BYTES = 112 << 20


@dataclasses.dataclass
class Block:
  """Some rows on their way into the store, `n` in every array.

  Attributes:
    dense: Raw values, columns in the order of `Schema.dense_features`.
    ids: Single-valued id feature -> row of its vocabulary.
    lists: Sequence or multi-valued feature -> start and length of each row's
      slice of the values given to `ColumnWriter.append_values`, oldest first.
    vectors: Vector feature -> its values.
    labels: Label -> outcome, NaN where missing.
    groups: `"group"` and `"query"`, where the data has them -> any numbers
      that tell the groups apart.
  """

  dense: Float[np.ndarray, "n num_dense"]
  ids: dict[str, Int[np.ndarray, " n"]]
  lists: dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]
  vectors: dict[str, Float[np.ndarray, "n dim"]]
  labels: dict[str, Float[np.ndarray, " n"]]
  groups: dict[str, Int[np.ndarray, " n"]]


class ColumnWriter:
  """Writes a store by appending blocks; holds no more than one block.

  Args:
    directory: An empty or new folder.
    schema: Features, labels and roles; `vocab_sizes` may still be missing.

  Raises:
    ValueError: From any method, if the adapter's arrays contradict the
      schema (wrong names or shapes, ids out of range, dense NaN).

  Example:
    >>> writer = ColumnWriter(directory, schema)        # doctest: +SKIP
    >>> start = writer.append_values("history", np.array([3, 1, 2]))
    >>> writer.append("train", Block(...))
    >>> writer.finish(dataclasses.replace(schema, vocab_sizes={"item": 4}))
  """

  def __init__(self, directory: epath.PathLike, schema: Schema):
    self._directory = epath.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    self._layout = _Layout(schema)
    self._values = {
      feature.name: self._directory / f"values_{position}.i32"
      for position, feature in enumerate(self._layout.lists)
    }
    for path in (*map(self._rows, SPLITS), *self._values.values()):
      path.write_bytes(b"")
    self._num_rows = dict.fromkeys(SPLITS, 0)
    self._num_values = dict.fromkeys(self._values, 0)
    self._list_end = dict.fromkeys(self._values, 0)
    self._max_len = dict.fromkeys(self._values, 0)
    self._max_id = {f.name: 0 for f in schema.id_features}
    self._groups = None
    self._moments = _Moments(len(schema.dense_features))

  def append(self, split: str, block: Block) -> None:
    """Appends the rows of `block` to `split`."""
    self._check(block)
    rows = self._layout.pack(block)
    self._track(block, len(rows))
    if split == "train":
      self._moments.update(block.dense)
    _append(self._rows(split), rows)
    self._num_rows[split] += len(rows)

  def append_values(
    self, feature: str, values: Int[np.ndarray, " values"]
  ) -> int:
    """Appends ids to a list feature's values; returns the first's index."""
    start = self._num_values[feature]
    if len(values):
      if values.min() < 0:
        raise ValueError(f"feature {feature!r}: negative id {values.min()}")
      self._max_id[feature] = max(self._max_id[feature], int(values.max()))
      _append(self._values[feature], np.ascontiguousarray(values, "<i4"))
      self._num_values[feature] += len(values)
    return start

  def finish(self, schema: Schema) -> None:
    """Completes the store; nothing reads it before this.

    Args:
      schema: The schema given before, now with `vocab_sizes`. A multi-valued
        feature without `max_len` gets that of its longest list.
    """
    schema = dataclasses.replace(
      schema, features=tuple(self._with_max_len(f) for f in schema.features)
    )
    if _Layout(schema).parts() != self._layout.parts():
      raise ValueError("finish: the schema's features or labels have changed")
    self._check_ranges(schema)
    for name, path in self._values.items():
      # A row is read as max_len values from its start: the last needs room.
      _append(path, np.zeros(schema.feature(name).max_len, "<i4"))
    mean, std = self._moments.result()
    manifest = {
      "format": FORMAT,
      "schema": schema.to_dict(),
      "num_rows": self._num_rows,
      "num_values": self._num_values,
      "groups": list(self._groups or ()),
      "dense_mean": mean.tolist(),
      "dense_std": std.tolist(),
    }
    path = self._directory / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1))

  def _rows(self, split: str) -> epath.Path:
    return self._directory / f"{split}.rows"

  def _check(self, block: Block):
    layout = self._layout
    expected = {
      "ids": [f.name for f in layout.single],
      "lists": [f.name for f in layout.lists],
      "vectors": [f.name for f in layout.vectors],
      "labels": [label.name for label in layout.labels],
    }
    for part, names in expected.items():
      if set(getattr(block, part)) != set(names):
        given = sorted(getattr(block, part))
        raise ValueError(f"block {part}: got {given}, the schema has {names}")
    if self._groups is None:
      self._groups = tuple(g for g in GROUPS if g in block.groups)
    if set(block.groups) != set(self._groups):
      raise ValueError(
        f"block groups: got {sorted(block.groups)}, blocks before had "
        f"{list(self._groups)}; allowed are {list(GROUPS)}"
      )
    if not np.isfinite(block.dense).all():
      raise ValueError("block dense: values must be finite")

  def _track(self, block: Block, num_rows: int):
    if not num_rows:
      return
    for name, values in block.ids.items():
      if values.min() < 0:
        raise ValueError(f"feature {name!r}: negative id {values.min()}")
      self._max_id[name] = max(self._max_id[name], int(values.max()))
    for name, (starts, lengths) in block.lists.items():
      if starts.min() < 0 or lengths.min() < 0:
        raise ValueError(f"feature {name!r}: negative start or length")
      end = int((starts.astype(np.int64) + lengths).max())
      self._list_end[name] = max(self._list_end[name], end)
      self._max_len[name] = max(self._max_len[name], int(lengths.max()))

  def _with_max_len(self, feature: Feature) -> Feature:
    if not feature.is_list or feature.max_len is not None:
      return feature
    return dataclasses.replace(
      feature, max_len=max(1, self._max_len[feature.name])
    )

  def _check_ranges(self, schema: Schema):
    for feature in schema.id_features:
      size = schema.vocab_sizes[feature.vocab]
      if self._max_id[feature.name] >= size:
        raise ValueError(
          f"feature {feature.name!r}: id {self._max_id[feature.name]} in a "
          f"vocabulary of {size} rows"
        )
    for name, end in self._list_end.items():
      if end > self._num_values[name]:
        raise ValueError(
          f"feature {name!r}: a list ends at {end}, but only "
          f"{self._num_values[name]} values were appended"
        )


class Columns:
  """A prepared data set, opened for reading.

  Resident memory stays bounded however much is read, and any number of
  threads may read at once.

  Attributes:
    schema: The data set's schema, with `vocab_sizes`.
    num_rows: Number of rows of each split.
    directory: Where it lies; adapters keep vocabularies beside the rows (see
      `vocabulary.save_values`).
    dense_mean, dense_std: What dense columns are standardised with.

  Raises:
    UserError: If the folder holds no complete store of this format.

  Example:
    >>> columns = Columns(directory)                    # doctest: +SKIP
    >>> columns.read("valid", np.array([7, 3])).labels["click"]
    array([0., 1.], dtype=float32)
  """

  def __init__(self, directory: epath.PathLike):
    self.directory = epath.Path(directory)
    try:
      manifest = json.loads((self.directory / "manifest.json").read_text())
    except (OSError, ValueError) as error:
      raise UserError(
        f"{self.directory}: no complete prepared data set here "
        f"({type(error).__name__}); delete the folder and prepare it again"
      ) from error
    if manifest.get("format") != FORMAT:
      raise UserError(
        f"{self.directory}: prepared data of format "
        f"{manifest.get('format')}, expected {FORMAT}; delete the folder and "
        "prepare it again"
      )
    self.schema = Schema.from_dict(manifest["schema"], str(self.directory))
    self.num_rows: dict[str, int] = manifest["num_rows"]
    self._groups = manifest["groups"]
    self._real_labels = frozenset(
      label.name for label in self.schema.labels if label.kind == "real"
    )
    self.dense_mean = np.asarray(manifest["dense_mean"], np.float32)
    self.dense_std = np.asarray(manifest["dense_std"], np.float32)
    self._layout = _Layout(self.schema)
    resident = Resident(_RESIDENT_BYTES)
    self._rows = {
      split: MappedRows(
        self.directory / f"{split}.rows",
        (self.num_rows[split], self._layout.num_words),
        resident,
      )
      for split in SPLITS
    }
    self._values = {
      f.name: MappedRows(
        self.directory / f"values_{position}.i32",
        (manifest["num_values"][f.name] + f.max_len, 1),
        resident,
        width=f.max_len,
      )
      for position, f in enumerate(self._layout.lists)
    }

  def read(self, split: str, indices: Int[np.ndarray, " batch"]) -> Batch:
    """The rows at `indices` as NumPy arrays, in that order.

    Sorted indices are the fastest; within a training batch order is free.

    Raises:
      IndexError: If an index is outside [0, num_rows[split]).
    """
    layout, size = self._layout, len(indices)
    rows = self._rows[split].gather(indices)
    starts = np.ascontiguousarray(rows[:, layout.starts]).view(np.int64)
    # One transposing copy makes every column contiguous.
    lengths, single, groups, labels = (
      np.ascontiguousarray(rows[:, part].T)
      for part in (layout.lengths, layout.ids, layout.groups, layout.outcomes)
    )
    ids = {f.name: single[i] for i, f in enumerate(layout.single)}
    id_mask = {}
    for i, feature in enumerate(layout.lists):
      ids[feature.name], id_mask[feature.name] = self._read_list(
        feature, starts[:, i], lengths[i]
      )
    labels = labels.view(np.float32)
    observed = ~np.isnan(labels)
    labels = np.where(observed, labels, np.float32(0))
    scenario = self.schema.roles.scenario
    return Batch(
      dense=self._standardise(rows[:, layout.dense].view(np.float32)),
      ids=ids,
      id_mask=id_mask,
      vectors={
        f.name: np.ascontiguousarray(rows[:, part]).view(np.float32)
        for f, part in zip(layout.vectors, layout.vector_parts, strict=True)
      },
      labels={v.name: labels[i] for i, v in enumerate(layout.labels)},
      label_mask={v.name: observed[i] for i, v in enumerate(layout.labels)},
      scenario=(
        np.zeros(size, np.int32) if scenario is None else ids[scenario]
      ),
      groups={g: groups[GROUPS.index(g)] for g in self._groups},
      example_mask=np.ones(size, bool),
      real_labels=self._real_labels,
    )

  def raw_dense(self, split: str) -> Float[np.ndarray, "rows num_dense"]:
    """All dense values of a split as the source has them."""
    dense = np.empty((self.num_rows[split], len(self.dense_mean)), np.float32)
    for start in range(0, len(dense), 1 << 16):
      stop = min(start + (1 << 16), len(dense))
      rows = self._rows[split].gather(np.arange(start, stop))
      dense[start:stop] = rows[:, self._layout.dense].view(np.float32)
    return dense

  def _standardise(self, dense):
    dense = dense - self.dense_mean
    dense /= self.dense_std
    return np.clip(dense, -DENSE_LIMIT, DENSE_LIMIT, out=dense)

  def _read_list(self, feature: Feature, starts, lengths):
    if feature.kind == "sequence":
      starts = starts + np.maximum(lengths - feature.max_len, 0)
    ids = self._values[feature.name].gather(starts)
    mask = np.arange(feature.max_len, dtype=np.int32) < lengths[:, None]
    np.multiply(ids, mask, out=ids)
    return ids, mask


def pad_batch(batch: Batch, size: int) -> Batch:
  """Pads a batch of NumPy arrays with masked examples to `size`.

  Padding is all zeros: ids of row 0, every mask False.

  Raises:
    ValueError: If the batch is larger than `size`.

  Example:
    >>> pad_batch(columns.read("test", np.arange(3)), 4).example_mask
    array([ True,  True,  True, False])                 # doctest: +SKIP
  """
  if batch.size > size:
    raise ValueError(f"cannot pad a batch of {batch.size} to {size} examples")

  def pad(array):
    padded = np.zeros((size, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded

  def pad_all(arrays):
    return {name: pad(array) for name, array in arrays.items()}

  return Batch(
    dense=pad(batch.dense),
    ids=pad_all(batch.ids),
    id_mask=pad_all(batch.id_mask),
    vectors=pad_all(batch.vectors),
    labels=pad_all(batch.labels),
    label_mask=pad_all(batch.label_mask),
    scenario=pad(batch.scenario),
    groups=pad_all(batch.groups),
    example_mask=pad(batch.example_mask),
    event_age=pad_all(batch.event_age),
    real_labels=batch.real_labels,
  )


def _append(path: epath.Path, array: np.ndarray):
  with open(path, "ab") as file:
    file.write(array.data)


class _Layout:
  """Which 32-bit words of a row hold what."""

  def __init__(self, schema: Schema):
    self.lists = [f for f in schema.id_features if f.is_list]
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

  def _words(self, count: int) -> slice:
    self.num_words += count
    return slice(self.num_words - count, self.num_words)

  def parts(self):
    """What makes two layouts equal."""
    kinds = (self.lists, self.single, self.vectors, self.labels)
    return [[entry.name for entry in kind] for kind in kinds], self.num_words

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
    return rows


class _Moments:
  """Running mean and standard deviation of columns, in float64."""

  def __init__(self, num_columns: int):
    self.count = 0
    self.mean = np.zeros(num_columns)
    self.squares = np.zeros(num_columns)
    self.low = np.full(num_columns, np.inf)
    self.high = np.full(num_columns, -np.inf)

  def update(self, values: Float[np.ndarray, "n columns"]):
    if not len(values):
      return
    values = values.astype(np.float64)
    mean = values.mean(axis=0)
    delta = mean - self.mean
    total = self.count + len(values)
    # Chan, Golub and LeVeque, The American Statistician 37 (1983), eq. 2.1.
    self.squares += ((values - mean) ** 2).sum(axis=0)
    self.squares += delta**2 * (self.count * len(values) / total)
    self.mean += delta * (len(values) / total)
    self.count = total
    self.low = np.minimum(self.low, values.min(axis=0))
    self.high = np.maximum(self.high, values.max(axis=0))

  def result(self):
    std = np.sqrt(self.squares / max(self.count, 1)).astype(np.float32)
    # Rounding leaves a constant column a tiny deviation: compare its ends.
    constant = (self.low >= self.high) | (std == 0)
    return self.mean, np.where(constant, np.float32(1), std)
