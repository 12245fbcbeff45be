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

import recjax.data
from recjax.batch import Batch
from recjax.data import balance
from recjax.data.columns import FORMAT, Columns, pad_batch
from recjax.data.length_buckets import LengthBuckets
from recjax.errors import UserError
from recjax.schema import suggest


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
  length_buckets: tuple[int, ...] = (),
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
    length_buckets: Groups the rows by their longest sequence; see
      `LengthBuckets`. Each bucket's last batch is padded. Shuffled, the batches
      of all buckets come in random order; unshuffled, bucket after bucket.

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
  local_size = batch_size // process_count
  buckets = LengthBuckets(columns, split, batch_size, length_buckets)

  def read(batch_number: int) -> Batch:
    epoch, step = divmod(batch_number, buckets.num_steps)
    positions = process_index * local_size + np.arange(local_size)
    rows, max_len = buckets.rows(
      step, positions, seed=seed if shuffle else None, epoch=epoch
    )
    batch = columns.read(split, rows, max_len=max_len)
    return batch if len(rows) == local_size else pad_batch(batch, local_size)

  num_batches = (
    sys.maxsize if num_epochs is None else num_epochs * buckets.num_steps
  )
  return (
    grain.MapDataset.range(num_batches)
    .map(read)
    .to_iter_dataset(
      grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    )
  )


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
    columns = Columns(scratch)
    if columns.schema.trial is not None:
      balance.warn(columns)
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
