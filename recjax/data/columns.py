"""The prepared data set: a memory-mapped store of fixed-size rows.

Reading a shuffled batch means jumping to as many places on disk as the batch
has rows, so everything that belongs to one row lies in one place:

```
manifest.json    format, schema, row counts, mean and std of dense columns
train.rows       [num_rows, words] of little-endian 32-bit words; also
valid.rows       a row: list starts (64 bit), list lengths, ids, groups,
test.rows        dense, labels (NaN = missing), vectors, time (64 bit), trial
values_0.i32     entries of the first list feature, then max_len zeros; also
values_1.i32     a row's list is a slice, and slices may overlap
```

Lists are slices so that a user's history is stored once and not once a row.
An entry is an id; of a sequence whose schema says more of its events it is the
event's time (64 bit, if `time` is named), its id and its sides, so that what is
known of an event lies in one place too. Times are float64 seconds; only rows
of a schema with event times hold their own. A batch has the difference.
Dense columns are stored raw and standardised when read, with the training
part's mean and standard deviation.
"""

import dataclasses
import json
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from recjax.batch import Batch
from recjax.data.mapped_rows import MappedRows, Resident
from recjax.data.moments import Moments
from recjax.data.row_layout import GROUPS, Block, RowLayout
from recjax.errors import UserError
from recjax.schema import SPLITS, Feature, Schema

FORMAT = 2
DENSE_LIMIT = 10.0  # Standardised values are clipped to +-DENSE_LIMIT.
_RESIDENT_BYTES = 112 << 20


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
    self._layout = RowLayout(schema)
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
    self._max_id = {
      f.name: 0 for f in (*schema.id_features, *schema.text_features)
    }
    self._groups = None
    self._moments = Moments(len(schema.dense_features))

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
    self,
    feature: str,
    values: Int[np.ndarray, " values"],
    *,
    time: Float[np.ndarray, " values"] | None = None,
    sides: Mapping[str, Int[np.ndarray, " values"]] | None = None,
  ) -> int:
    """Appends to a list feature's values; returns the first's index.

    Args:
      feature: Its name; sides come with their sequence.
      values: Ids.
      time: When each event was, in seconds, if the schema names its time. No
        row's slice may hold an event of its own or a later time.
      sides: The ids of each side, if the schema names sides.
    """
    start = self._num_values[feature]
    if len(values):
      entries = self._layout.pack_values(feature, values, time, sides or {})
      for name, ids in {feature: values, **(sides or {})}.items():
        if ids.min() < 0:
          raise ValueError(f"feature {name!r}: negative id {ids.min()}")
        self._max_id[name] = max(self._max_id[name], int(ids.max()))
      _append(self._values[feature], entries)
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
    if RowLayout(schema).parts() != self._layout.parts():
      raise ValueError("finish: the schema's features or labels have changed")
    self._check_ranges(schema)
    for name, path in self._values.items():
      # A row is read as max_len entries from its start: the last needs room.
      words = schema.feature(name).max_len * self._layout.entry_words[name]
      _append(path, np.zeros(words, "<i4"))
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
    if (block.time is None) == layout.has_time:
      raise ValueError(
        "block time: must be there if, and only if, a sequence names the "
        "times of its events"
      )
    if layout.has_time and not np.isfinite(block.time).all():
      raise ValueError("block time: values must be finite")
    if (block.trial is None) == layout.has_trial:
      raise ValueError(
        "block trial: must be there if, and only if, the schema has a trial"
      )

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
    for feature in (*schema.id_features, *schema.text_features):
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
    self._layout = RowLayout(self.schema)
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
        (
          manifest["num_values"][f.name] + f.max_len,
          self._layout.entry_words[f.name],
        ),
        resident,
        width=f.max_len,
      )
      for position, f in enumerate(self._layout.lists)
    }

  def read(
    self,
    split: str,
    indices: Int[np.ndarray, " batch"],
    *,
    max_len: int | None = None,
  ) -> Batch:
    """The rows at `indices` as NumPy arrays, in that order.

    Sorted indices are the fastest; within a training batch order is free.

    Args:
      split: `train`, `valid` or `test`.
      indices: Row numbers.
      max_len: Cuts every sequence to its so many last events; None reads all
        that the schema keeps.

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
    id_mask, event_age = {}, {}
    time = np.ascontiguousarray(rows[:, layout.time]).view(np.float64)
    for i, feature in enumerate(layout.lists):
      entries, mask = self._read_list(
        feature, starts[:, i], lengths[i], max_len
      )
      names = layout.id_words[feature.name]
      for name, word in names.items():
        ids[name] = np.multiply(entries[..., word], mask, dtype=np.int32)
        id_mask[name] = mask
      if feature.time is not None:
        times = np.ascontiguousarray(entries[..., :2]).view(np.float64)[..., 0]
        event_age[feature.name] = np.where(mask, time - times, 0).astype(
          np.float32
        )
    texts = [f.name for f in self.schema.text_features]
    tokens, token_mask = (
      {name: part.pop(name) for name in texts} for part in (ids, id_mask)
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
      event_age=event_age,
      trial=layout.unpack_trial(rows) if layout.has_trial else None,
      tokens=tokens,
      token_mask=token_mask,
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

  def lengths(
    self, split: str, indices: Int[np.ndarray, " batch"]
  ) -> Int[np.ndarray, "batch sequences"]:
    """Events that are kept of each of `Schema.sequences`, of some rows."""
    rows = self._rows[split].gather(indices)[:, self._layout.lengths]
    columns = [
      np.minimum(rows[:, i], feature.max_len)
      for i, feature in enumerate(self._layout.lists)
      if feature.kind == "sequence"
    ]
    return np.stack(columns, axis=1) if columns else rows[:, :0]

  def _read_list(self, feature: Feature, starts, lengths, max_len):
    """The entries of a batch's lists, `[batch, max_len, words]`, and a mask."""
    width = feature.max_len
    if feature.kind == "sequence":
      width = min(width, max_len or width)
      starts = starts + np.maximum(lengths - width, 0)
    words = self._layout.entry_words[feature.name]
    entries = self._values[feature.name].gather(starts, width)
    mask = np.arange(width, dtype=np.int32) < lengths[:, None]
    return entries.reshape(-1, width, words), mask


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

  return jax.tree.map(pad, batch)


def _append(path: epath.Path, array: np.ndarray):
  with open(path, "ab") as file:
    file.write(array.data)
