"""From a config to batches: preparing once, then shuffled reading.

`open_dataset` turns `config.data` into a prepared data set in a cache folder;
`make_loader` reads it in fixed-size batches. A batch is one vectorised read of
the store, so there is no Python loop over rows, and a shuffled epoch needs
neither a list of row numbers nor a shuffle buffer: row `permute(i, ...)` comes
`i`-th. The position in the stream is one integer, so a run that stopped goes
on with exactly the batches it had not seen.
"""

import dataclasses
import errno
import hashlib
import importlib
import json
import os
import pathlib
import pkgutil
import shutil
import sys
import tempfile
import time
import types
import typing
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

import recjax.data
from recjax.batch import Batch
from recjax.data.columns import FORMAT, Columns, pad_batch
from recjax.errors import UserError
from recjax.schema import suggest

_ROUNDS = 6


def open_dataset(config: Mapping[str, Any]) -> Columns:
  """Opens the data set that a config names, preparing it the first time.

  The prepared copy lies in a folder of the cache whose name stands for the
  adapter, its version, its options and its source files (path, size and time
  of change), so a changed file is prepared anew. Processes that prepare the
  same data at once do not disturb each other.

  Args:
    config: `name`, the adapter; the fields of the adapter's `Config`; and
      `cache_dir` (default: `$XDG_CACHE_HOME/recjax`, else `~/.cache/recjax`).

  Raises:
    UserError: If a field is unknown, missing or of the wrong type, a source
      is missing or wrong, or the disk is too small.

  Example:
    >>> columns = open_dataset({                        # doctest: +SKIP
    ...     "name": "table", "path": "log.parquet", "schema": "log.json"})
  """
  fields = dict(config)
  name = fields.pop("name", None)
  cache_dir = pathlib.Path(fields.pop("cache_dir", None) or _default_cache())
  cache_dir = cache_dir.expanduser()
  adapter = _adapter(name)
  options = _read_options(adapter.Config, name, fields)
  sources = [pathlib.Path(path) for path in adapter.sources(options)]
  directory = cache_dir / f"{name}-{_cache_key(adapter, options, sources)}"
  if directory.exists():
    try:
      return Columns(directory)
    except UserError as error:
      logging.warning("Preparing again: %s", error)
      _discard(directory)
  _prepare(adapter, options, sources, directory)
  return Columns(directory)


def make_loader(
  columns: Columns,
  split: str,
  *,
  batch_size: int,
  shuffle: bool,
  seed: int = 0,
  num_epochs: int | None = 1,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  prefetch: int = 8,
) -> grain.IterDataset:
  """Batches of a fixed size, every row exactly once an epoch.

  The last batch of an epoch is padded and masked (`Batch.example_mask`).
  Unshuffled batches keep the order of the rows. A shuffled epoch is a fresh
  permutation of all rows by `seed` and the epoch's number; inside a batch the
  rows are in order of their number, since that reads fastest.

  Args:
    columns: The prepared data.
    split: `train`, `valid` or `test`.
    batch_size: Examples a global batch; the processes share it equally.
    shuffle: Whether to permute the rows of each epoch.
    seed: Of the permutation; at least 0.
    num_epochs: None means endless.
    process_index: Which part of each global batch to read.
    process_count: Number of parts.
    num_threads: Threads that read ahead; 0 reads when asked.
    prefetch: Batches to read ahead.

  Returns:
    A data set of `Batch` with `batch_size // process_count` examples. Its
    iterator's `get_state` is a small dictionary, exact under `set_state`.

  Raises:
    UserError: If the split has no rows, the batch size does not divide among
      the processes, or an argument is out of range.

  Example:
    >>> loader = make_loader(columns, "train", batch_size=512, shuffle=True)
    >>> for batch in loader: ...                        # doctest: +SKIP
  """
  _check_arguments(columns, split, batch_size, seed, num_epochs, process_count)
  num_rows = columns.num_rows[split]
  local_size = batch_size // process_count
  num_steps = steps_per_epoch(num_rows, batch_size)

  def read(batch_number: int) -> Batch:
    epoch, step = divmod(batch_number, num_steps)
    start = step * batch_size + process_index * local_size
    rows = np.arange(start, min(start + local_size, num_rows))
    if shuffle:
      rows = permute(rows, num_rows, seed=seed, epoch=epoch)
      rows.sort()
    batch = columns.read(split, rows)
    return batch if len(rows) == local_size else pad_batch(batch, local_size)

  num_batches = sys.maxsize if num_epochs is None else num_epochs * num_steps
  return (
    grain.MapDataset.range(num_batches)
    .map(read)
    .to_iter_dataset(
      grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    )
  )


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
  """Number of batches that hold every row once, the last one padded.

  Example:
    >>> steps_per_epoch(10, 4)
    3
  """
  return -(-num_rows // batch_size)


def permute(
  positions: Int[np.ndarray, " positions"],
  num_rows: int,
  *,
  seed: int,
  epoch: int,
) -> Int[np.ndarray, " positions"]:
  """Row numbers at some positions of a pseudo-random permutation.

  Needs no memory beyond its arguments: the permutation is never written out.
  Grain's own shuffle answers for one element a call; this one for a batch.

  Args:
    positions: In [0, num_rows).
    num_rows: Number of rows that are permuted.
    seed: At least 0; another seed is another permutation.
    epoch: At least 0; likewise.

  Returns:
    Int64 row numbers in [0, num_rows), different for different positions.

  Example:
    >>> sorted(permute(np.arange(5), 5, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4]

  Source:
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002:
    generalised Feistel network on Z_a x Z_b with a * b >= num_rows, and
    cycle walking for the few values above. Round function and number of
    rounds (6) are our choice: this shuffles and keeps no secrets.
  """
  keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS)
  width = int(np.ceil(np.sqrt(num_rows)))
  height = -(-num_rows // width)
  rows = _feistel(positions, width, height, keys)
  while len(outside := np.flatnonzero(rows >= num_rows)):
    rows[outside] = _feistel(rows[outside], width, height, keys)
  return rows


def _check_arguments(
  columns: Columns, split, batch_size, seed, num_epochs, process_count
):
  if split not in columns.num_rows:
    raise UserError(
      f"unknown split {split!r}" + suggest(split, columns.num_rows)
    )
  if columns.num_rows[split] == 0:
    raise UserError(f"{columns.directory}: the {split} part has no rows")
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f"batch_size ({batch_size}) must be positive and divisible by the "
      f"number of processes ({process_count})"
    )
  if seed < 0:
    raise UserError(f"seed must be at least 0, got {seed}")
  if num_epochs is not None and num_epochs < 1:
    raise UserError(f"num_epochs must be at least 1 or None, got {num_epochs}")


def _feistel(numbers, width: int, height: int, keys):
  """A bijection on [0, width * height)."""
  left = numbers // width
  right = (numbers - left * width).astype(np.uint32)
  left = left.astype(np.uint32)
  for i, key in enumerate(keys):
    if i % 2:
      right = _shift(right, left, width, key)
    else:
      left = _shift(left, right, height, key)
  return left.astype(np.int64) * width + right


def _shift(moved, by, size: int, key):
  """`moved` plus a keyed hash of `by`, modulo `size`."""
  mixed = by ^ key
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    mixed ^= mixed >> np.uint32(shift)
    mixed *= np.uint32(factor)
  mixed ^= mixed >> np.uint32(16)
  # Neither step divides: the high half of a product takes 32 random bits to
  # [0, size), and below zero the difference wraps to a large number.
  scaled = mixed.astype(np.uint64) * np.uint64(size) >> np.uint64(32)
  moved = moved + scaled.astype(np.uint32)
  return np.minimum(moved, moved - np.uint32(size))


def _default_cache() -> pathlib.Path:
  base = os.environ.get("XDG_CACHE_HOME")
  return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / (
    "recjax"
  )


def _adapter(name) -> types.ModuleType:
  modules = [m.name for m in pkgutil.iter_modules(recjax.data.__path__)]
  if name in modules:
    module = importlib.import_module(f"recjax.data.{name}")
    if hasattr(module, "prepare"):
      return module
  known = [
    m
    for m in modules
    if hasattr(importlib.import_module(f"recjax.data.{m}"), "prepare")
  ]
  raise UserError(
    f"data.name: unknown data set {name!r}" + suggest(str(name), known)
  )


def _read_options(options, name: str, values: dict[str, Any]):
  """Builds the adapter's `Config`, checking names and types."""
  fields = {f.name: f for f in dataclasses.fields(options)}
  for key, value in values.items():
    if key not in fields:
      raise UserError(
        f"data.{key}: unknown option of data set {name!r}"
        + suggest(key, [*fields, "name", "cache_dir"])
      )
    kind = fields[key].type
    allowed = (int, float) if kind is float else typing.get_origin(kind) or kind
    if allowed is tuple and isinstance(value, list):
      value = values[key] = tuple(value)  # JSON has no tuples.
    if allowed is types.UnionType:
      allowed = kind
    if not isinstance(value, allowed) or (kind is int and value is True):
      raise UserError(
        f"data.{key}: must be {getattr(kind, '__name__', kind)}, got {value!r}"
      )
  for key, field in fields.items():
    if (
      key not in values
      and field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise UserError(f"data.{key}: data set {name!r} needs this option")
  return options(**values)


def _cache_key(adapter, options, sources: list[pathlib.Path]) -> str:
  try:
    stats = [(str(path.absolute()), path.stat()) for path in sources]
  except OSError as error:
    raise UserError(
      f"{error.filename}: cannot be read ({error.strerror}); check the path"
    ) from error
  content = [
    FORMAT,
    adapter.__name__,
    adapter.VERSION,
    dataclasses.asdict(options),
    [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
  ]
  text = json.dumps(content, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _prepare(adapter, options, sources: list[pathlib.Path], directory):
  """Prepares beside the final place and moves the complete folder there."""
  name, cache_dir = directory.name, directory.parent
  if hasattr(adapter, "estimate_bytes"):
    needed = adapter.estimate_bytes(options)
  else:
    needed = 3 * sum(path.stat().st_size for path in sources)
  try:
    cache_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir).free
    if free < needed:
      raise UserError(
        f"{cache_dir}: preparing the data needs about {needed} bytes, but "
        f"only {free} are free; free some or set data.cache_dir to a "
        "larger disk"
      )
    logging.info("Preparing data set %s (%d source files)", name, len(sources))
    start = time.monotonic()
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", dir=cache_dir))
  except OSError as error:
    raise UserError(
      f"{cache_dir}: cannot write the cache here ({error.strerror}); set "
      "data.cache_dir"
    ) from error
  try:
    adapter.prepare(options, scratch)
    Columns(scratch)
    try:
      scratch.rename(directory)
    except OSError as error:
      # Another process was faster; its folder is as complete as ours.
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    raise UserError(
      f"{cache_dir}: the disk is full; set data.cache_dir to a larger one"
    ) from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  logging.info("Prepared %s in %.1f s", directory, time.monotonic() - start)


def _discard(directory: pathlib.Path):
  """Takes a broken folder out of the way before deleting it."""
  trash = pathlib.Path(
    tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent)
  )
  try:
    directory.rename(trash / "broken")
  except FileNotFoundError:
    pass  # Another process did the same.
  shutil.rmtree(trash, ignore_errors=True)
