"""Scores raw rows with an exported model; needs only JAX, NumPy, flatbuffers.

A model that reads text needs the tokenizers library as well.

`recjax.export` puts this file into each export as `score.py`, with the text of
`raw_rows` in place of its import, so that it imports nothing of recjax:

```sh
python score.py --check              # the scores that were stored at export
python score.py --input=rows.jsonl   # a line of scores for each line of input
```

```python
scorer = Scorer("exports/msn")
scorer.score({"user_id": ["u7", None], "price": [1.5, 2.0], ...})
# {"click": array([0.31, 0.07])}
```

A column is a list or an array with one entry a row; `raw_rows` (in an export:
the text further down) says how entries are read.

Weights are mapped from their files: on a CPU the tables are used where they
lie. Batches are padded to powers of two, each compiled once.
"""

import argparse
import itertools
import json
import mmap
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from recjax.raw_rows import Encoder, InputError

_DTYPES = {"F32": "<f4", "U16": "<u2", "I32": "<i4", "U64": "<u8"}


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
        self.manifest,
        map_tensors(self.folder / "vocabulary.safetensors"),
        _read_tokenizer(self.folder / "tokenizer.json"),
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

  @property
  def columns(self) -> list[str]:
    """Names of the columns that a row needs."""
    return self._encoder.columns

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


def _read_tokenizer(path: pathlib.Path) -> Any:
  """What splits texts into tokens; None where no column holds text."""
  if not path.exists():
    return None
  try:
    import tokenizers
  except ImportError as error:
    raise InputError("the model reads text: pip install tokenizers") from error
  tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
  # A text that spells a special token is text.
  tokenizer.encode_special_tokens = True
  return tokenizer


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
  names = scorer.columns
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
