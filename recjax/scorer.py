"""Scores raw rows with an exported model; needs only JAX, NumPy, flatbuffers.

`recjax.export` puts a copy of this file into each export as `score.py`, so it
imports nothing of recjax:

```sh
python score.py --check              # the scores that were stored at export
python score.py --input=rows.jsonl   # a line of scores for each line of input
```

```python
scorer = Scorer("exports/msn")
scorer.score({"user_id": ["u7", None], "price": [1.5, 2.0], ...})
# {"click": array([0.31, 0.07])}
```

A column is a list or an array with one entry a row. How entries are read:

* `sparse`: an integer or a string; None (or NaN) is a missing value. What the
  training part did not hold gets row 0 of its vocabulary.
* several values (`multi`, `sequence`): a list, or a string where the manifest
  gives a separator; None is an empty list, and None or "" in it is left out.
  Of too long a list the last values of a sequence are kept, the first of a set.
* `dense`: a finite number. `vector`: a list of finite numbers.

Weights are mapped from their files: on a CPU the tables are used where they
lie. Batches are padded to powers of two, each compiled once.
"""

import argparse
import itertools
import json
import mmap
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

_DTYPES = {"F32": "<f4", "U16": "<u2", "I32": "<i4", "U64": "<u8"}
_DENSE_LIMIT = 10.0  # Standardised values are clipped to +- this.


class InputError(ValueError):
  """A mistake in the rows to score or in the export, told in one line."""


class Scorer:
  """An export, loaded.

  Args:
    folder: What `experiments.export` wrote.
    max_batch_size: Rows that are scored at a time.

  Raises:
    InputError: If the folder holds no whole export.
  """

  def __init__(self, folder: str | pathlib.Path, max_batch_size: int = 4096):
    self.folder = pathlib.Path(folder)
    self.max_batch_size = max_batch_size
    try:
      self.manifest = json.loads((self.folder / "manifest.json").read_text())
      program = bytearray((self.folder / "model.bin").read_bytes())
      weights = {
        f"{kind}/{name}": array
        for kind in ("params", "tables")
        for name, array in map_tensors(
          self.folder / f"{kind}.safetensors"
        ).items()
      }
      self._encoder = Encoder(
        self.manifest, map_tensors(self.folder / "vocabulary.safetensors")
      )
    except (OSError, ValueError, KeyError) as error:
      raise InputError(f"{self.folder}: no whole export ({error})") from error
    try:
      exported = jax.export.deserialize(program)
    except Exception as error:  # What a damaged file raises is not said.
      raise InputError(
        f"{self.folder}/model.bin: cannot be read by JAX {jax.__version__} "
        f"({type(error).__name__}: {error}); export again"
      ) from error
    # On a CPU this is no copy: the arrays lie aligned in their files.
    self._weights = jax.device_put(weights)
    self._call = jax.jit(exported.call)

  def score(
    self, columns: Mapping[str, Sequence[Any]]
  ) -> dict[str, np.ndarray]:
    """Task -> probability of each row, or the expected real label in its unit.

    Args:
      columns: Feature -> raw values; columns that are no feature are ignored.

    Raises:
      InputError: If a feature is missing or a value is not as it must be.
    """
    kinds = self.manifest["tasks"]
    return {
      task: _symexp(values) if kinds[task] == "real" else _sigmoid(values)
      for task, values in self.predict(columns).items()
    }

  def predict(
    self, columns: Mapping[str, Sequence[Any]]
  ) -> dict[str, np.ndarray]:
    """Task -> the model's own outputs: logits, or `symlog` of a real label."""
    arrays = self._encoder.encode(columns)
    num_rows = len(arrays["example_mask"])
    parts = []
    for start in range(0, num_rows, self.max_batch_size):
      chunk = {
        name: array[start : start + self.max_batch_size]
        for name, array in arrays.items()
      }
      size = len(chunk["example_mask"])
      padded = {
        n: _pad(a, 1 << (size - 1).bit_length()) for n, a in chunk.items()
      }
      output = jax.device_get(self._call(self._weights, padded))
      parts.append({task: values[:size] for task, values in output.items()})
    return {
      task: np.concatenate([part[task] for part in parts] or [np.zeros(0)])
      for task in self.manifest["tasks"]
    }

  def differences(self, golden: Mapping[str, Any]) -> np.ndarray:
    """Each row's largest difference from stored predictions.

    Relative to the prediction where that is above 1.

    Args:
      golden: `columns` of raw values and `predictions`, as `golden.json`.
    """
    actual = self.predict(golden["columns"])
    parts = []
    for task, values in golden["predictions"].items():
      wanted = np.asarray(values)
      parts.append(
        np.abs(actual[task] - wanted) / np.maximum(1, np.abs(wanted))
      )
    return np.max(parts, axis=0)


class Encoder:
  """From raw columns to the arrays that the program takes.

  Args:
    manifest: Its `features`, `vocabularies` and `dense`.
    vocabularies: Name -> `<name>/keys`, sorted, and `<name>/rows`.
  """

  def __init__(
    self, manifest: Mapping[str, Any], vocabularies: Mapping[str, np.ndarray]
  ):
    self._manifest, self._vocabularies = manifest, vocabularies

  def encode(
    self, columns: Mapping[str, Sequence[Any]]
  ) -> dict[str, np.ndarray]:
    """`dense`, `ids/<name>`, `id_mask/<name>`, `vectors/<name>` and
    `example_mask`, one entry a row."""
    features = self._manifest["features"]
    for feature in features:
      if feature["name"] not in columns:
        raise InputError(
          f"column {feature['name']!r} is missing; the model needs "
          + ", ".join(f["name"] for f in features)
        )
    num_rows = len(columns[features[0]["name"]])
    arrays, dense = {}, []
    for feature in features:
      name, values = feature["name"], columns[feature["name"]]
      if len(values) != num_rows:
        raise InputError(
          f"column {name!r} has {len(values)} rows, "
          f"{features[0]['name']!r} has {num_rows}"
        )
      if feature["kind"] == "dense":
        dense.append(_numbers(values, name))
      elif feature["kind"] == "vector":
        arrays[f"vectors/{name}"] = _vectors(values, feature)
      elif "max_len" in feature:
        ids, mask = self._lists(values, feature)
        arrays[f"ids/{name}"], arrays[f"id_mask/{name}"] = ids, mask
      else:
        arrays[f"ids/{name}"] = self._rows(values, feature)
    scale = self._manifest["dense"]
    stacked = np.zeros((num_rows, len(dense)), np.float32)
    for position, numbers in enumerate(dense):
      stacked[:, position] = numbers
    stacked -= np.asarray(scale["mean"], np.float32)
    stacked /= np.asarray(scale["std"], np.float32)
    arrays["dense"] = np.clip(stacked, -_DENSE_LIMIT, _DENSE_LIMIT)
    arrays["example_mask"] = np.ones(num_rows, bool)
    return arrays

  def _rows(self, values, feature: dict[str, Any]) -> np.ndarray:
    """Vocabulary row of each value."""
    name = feature["vocabulary"]
    vocabulary = self._manifest["vocabularies"][name]
    keys, missing = _keys(values, vocabulary["type"], feature["name"])
    if vocabulary["buckets"]:
      buckets = np.uint64(vocabulary["buckets"])
      rows = 1 + (_mix(keys) % buckets).astype(np.int32)
      return np.where(missing, np.int32(0), rows)
    known = self._vocabularies[f"{name}/keys"]
    if not len(known):
      return np.where(missing, vocabulary["missing_row"], 0).astype(np.int32)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    rows = self._vocabularies[f"{name}/rows"][at]
    rows = np.where(known[at] == keys, rows, 0)
    return np.where(missing, vocabulary["missing_row"], rows).astype(np.int32)

  def _lists(self, values, feature) -> tuple[np.ndarray, np.ndarray]:
    lists = _split(values, feature)
    lists = [
      [v for v in row if not _is_missing(v) and v != ""] for row in lists
    ]
    max_len = feature["max_len"]
    kept = slice(-max_len, None) if feature["kind"] == "sequence" else None
    kept = kept or slice(max_len)
    lists = [row[kept] for row in lists]
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    mask = np.arange(max_len) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    flat = list(itertools.chain.from_iterable(lists))
    ids[mask] = self._rows(flat, feature)
    return ids, mask


def map_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a safetensors file, mapped and not read.

  The format is eight bytes (length of the header), a JSON header and the
  tensors' bytes. The library's own reader copies each tensor.
  """
  with open(path, "rb") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  start = 8 + int.from_bytes(data[:8], "little")
  tensors = {}
  for name, entry in json.loads(data[8:start]).items():
    if name != "__metadata__":
      dtype = np.dtype(_DTYPES[entry["dtype"]])
      begin, end = entry["data_offsets"]
      if start + end > len(data):
        raise ValueError(f"{path} is cut off")
      tensors[name] = np.frombuffer(
        data, dtype, (end - begin) // dtype.itemsize, start + begin
      ).reshape(entry["shape"])
  return tensors


def _keys(values, kind: str, column: str) -> tuple[np.ndarray, np.ndarray]:
  """64-bit key of each value, and which are missing (their key is 0)."""
  # Not as an array: NumPy would turn a NaN among strings into the text "nan",
  # and large integers beside it into floats that are other integers.
  values = values.tolist() if isinstance(values, np.ndarray) else list(values)
  missing = np.array([_is_missing(value) for value in values], bool)
  present = [v for v, gone in zip(values, missing, strict=True) if not gone]
  if kind == "string":
    found = _hash(
      value if isinstance(value, str) else str(_integer(value, column))
      for value in present
    )
  else:
    integers = [_integer(value, column) for value in present]
    found = np.array(integers, np.int64).view(np.uint64)
  keys = np.zeros(len(missing), np.uint64)
  keys[~missing] = found
  return keys, missing


def _is_missing(value) -> bool:
  return value is None or (
    isinstance(value, (float, np.floating)) and bool(value != value)
  )


def _integer(value, column: str) -> int:
  """An integer, or a text or float that names one."""
  if isinstance(value, str):
    try:
      value = int(value)
    except ValueError as error:
      raise InputError(
        f"column {column!r}: {error}; its ids are 64-bit integers"
      ) from error
  elif isinstance(value, (float, np.floating)):
    # Beyond it a float does not tell neighbouring integers apart.
    if not (abs(value) <= 2**53 and value == int(value)):
      raise _no_id(column)
  elif not isinstance(value, (int, np.integer)):
    raise _no_id(column)
  if not -(2**63) <= int(value) < 2**63:
    raise _no_id(column)
  return int(value)


def _no_id(column: str) -> InputError:
  return InputError(
    f"column {column!r}: an id must be a string or a 64-bit integer, one a "
    "row, or None"
  )


def _hash(texts: Iterable[str]) -> np.ndarray:
  """Key of each string: it sums a random number for each of its bytes.

  The number stands for the pair of byte and position (tabulation hashing).
  """
  encoded = [text.encode() for text in texts]
  lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
  data = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64)
  ends = np.cumsum(lengths)
  place = np.arange(len(data)) - np.repeat(ends - lengths, lengths)
  sums = np.zeros(len(data) + 1, np.uint64)
  np.cumsum(_mix(place.astype(np.uint64) << np.uint64(8) | data), out=sums[1:])
  return _mix(sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64))


def _mix(numbers: np.ndarray) -> np.ndarray:
  """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
  numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
  numbers ^= numbers >> np.uint64(30)
  numbers *= np.uint64(0xBF58476D1CE4E5B9)
  numbers ^= numbers >> np.uint64(27)
  numbers *= np.uint64(0x94D049BB133111EB)
  return numbers ^ (numbers >> np.uint64(31))


def _split(values, feature: dict[str, Any]) -> list[list[Any]]:
  """A list for each row."""
  separator = feature.get("separator")
  lists = []
  for row, value in enumerate(values):
    if isinstance(value, str):
      if separator is None:
        raise InputError(
          f"column {feature['name']!r}, row {row + 1}: must hold a list, got "
          f"{value!r}"
        )
      lists.append(value.split(separator))
    elif value is None:
      lists.append([])
    elif isinstance(value, list | tuple | np.ndarray):
      lists.append(list(value))
    else:
      raise InputError(
        f"column {feature['name']!r}, row {row + 1}: must hold lists, got "
        f"{value!r}"
      )
  return lists


def _numbers(values, column: str) -> np.ndarray:
  """A dense column in float32."""
  try:
    with np.errstate(over="ignore"):
      numbers = np.array(values, np.float64).astype(np.float32)
  except (TypeError, ValueError) as error:
    raise InputError(
      f"column {column!r}: {error}; every value must be a number"
    ) from error
  if numbers.ndim != 1 or not np.isfinite(numbers).all():
    row = int(np.argmin(np.isfinite(numbers))) if numbers.ndim == 1 else 0
    raise InputError(
      f"column {column!r}, row {row + 1}: {values[row]!r} must be one finite "
      "number"
    )
  return numbers


def _vectors(values, feature: dict[str, Any]) -> np.ndarray:
  """A vector column; the width is checked."""
  name, dim = feature["name"], feature["dim"]
  if not isinstance(values, np.ndarray) or values.dtype == object:
    values = _split(values, feature)
    for row, value in enumerate(values):
      if len(value) != dim:
        raise InputError(
          f"column {name!r}, row {row + 1}: {len(value)} numbers, must be {dim}"
        )
  try:
    numbers = np.array(values, np.float32).reshape(len(values), dim)
  except (TypeError, ValueError) as error:
    raise InputError(
      f"column {name!r}: {error}; a row must hold {dim} numbers"
    ) from error
  finite = np.isfinite(numbers).all(axis=1)
  if not finite.all():
    row = int(np.argmin(finite))
    raise InputError(f"column {name!r}, row {row + 1}: must be finite numbers")
  return numbers


def _pad(array: np.ndarray, size: int) -> np.ndarray:
  padded = np.zeros((size, *array.shape[1:]), array.dtype)
  padded[: len(array)] = array
  return padded


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 0.5 * (1.0 + np.tanh(0.5 * x.astype(np.float64)))


def _symexp(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float64)
  return np.sign(x) * np.expm1(np.abs(x))


def main(argv: Sequence[str] | None = None) -> None:
  """The command line of `score.py`."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--folder", default=pathlib.Path(__file__).parent)
  parser.add_argument(
    "--check", action="store_true", help="Compare with the stored scores."
  )
  parser.add_argument(
    "--tolerance", type=float, help="Of --check; by default the stored one."
  )
  parser.add_argument("--input", help="JSON objects of raw values, one a line.")
  arguments = parser.parse_args(argv)
  try:
    if arguments.check == bool(arguments.input):
      raise InputError("give either --check or --input=rows.jsonl")
    scorer = Scorer(arguments.folder)
    if arguments.check:
      _check(scorer, arguments.tolerance)
    else:
      _score_lines(scorer, pathlib.Path(arguments.input))
  except (InputError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _check(scorer: Scorer, tolerance: float | None) -> None:
  """Prints how far the stored rows are from their stored scores."""
  golden = json.loads((scorer.folder / "golden.json").read_text())
  tolerance = golden["tolerance"] if tolerance is None else tolerance
  difference = scorer.differences(golden)
  print(
    f"{len(difference)} rows, largest difference from the stored scores "
    f"{difference.max():.1e}"
  )
  # Not "above": a NaN must not pass.
  wrong = np.count_nonzero(~(difference <= tolerance))
  if wrong:
    raise InputError(f"{wrong} rows differ by more than {tolerance}")


def _score_lines(scorer: Scorer, path: pathlib.Path) -> None:
  """Prints an object of scores for each line of the file."""
  names = [feature["name"] for feature in scorer.manifest["features"]]
  with open(path, encoding="utf-8") as file:
    numbered = enumerate(file, 1)
    while lines := list(itertools.islice(numbered, scorer.max_batch_size)):
      rows = []
      for number, line in lines:
        try:
          row = json.loads(line)
          rows.append([row[name] for name in names])
        except (ValueError, KeyError, TypeError) as error:
          raise InputError(
            f"{path}, line {number}: must be a JSON object with every feature "
            f"({type(error).__name__}: {error})"
          ) from error
      columns = dict(
        zip(names, map(list, zip(*rows, strict=True)), strict=True)
      )
      try:
        scores = scorer.score(columns)
      except InputError as error:
        raise InputError(
          f"{path}, rows counted from line {lines[0][0]}: {error}"
        ) from error
      for row in zip(*(scores[task].tolist() for task in scores), strict=True):
        print(json.dumps(dict(zip(scores, row, strict=True))))


if __name__ == "__main__":
  main()
