"""Bytes that the Triton kernels load and store, by what their calls say.

What a kernel reads again, from a cache most likely, counts again. Triton's
interpreter counts the same: see `tests/aot/triton_values.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def issued_bytes(
  kernel: str, num_rows: int, grid: Sequence[int], options: Mapping[str, Any]
) -> int:
  """Of one call.

  Args:
    kernel: Name of the function in one of the `triton_kernels`.
    num_rows: Its scalar of this name.
    grid: Programs of each axis.
    options: Its constants.
  """
  return 4 * _WORDS[kernel](num_rows, tuple(grid), dict(options))


def _top_k(num_rows: int, grid: tuple[int, ...], options: dict) -> int:
  del grid
  n, k = options["num_columns"], options["top_k"]
  # Keys of 32 bits hold scores of 16.
  score = 0.5 if "32" in str(options["key_type"]) else 1
  read = n
  if options["vector"] * options["num_steps"] > 1:
    # The members of the best groups once more; a group is as long on average.
    num_groups = min(options["num_groups"], -(-n // options["vector"]))
    read += min(options["padded_k"], num_groups) * n / num_groups
  return round(num_rows * (score * (read + k) + k))


def _topk(num_rows: int, grid: tuple[int, ...], options: dict) -> int:
  scores = 2 * num_rows * options["num_keys"]
  pairs = 2 * grid[0] * options["padded_pairs"]
  return scores + pairs + 2 * num_rows * options["top_k"]


def _lookup(num_rows: int, grid: tuple[int, ...], options: dict) -> int:
  programs, dim = grid[0] * grid[1], options["key_dim"]
  rows = num_rows * options["num_heads"]
  key_blocks = -(-options["num_keys"] // options["block_keys"])
  has_gain = int(options["has_gain"])
  # Of each axis; for a LayerNorm a row is read first as a whole.
  queries = rows * dim * (key_blocks + has_gain)
  gains = programs * key_blocks * dim * has_gain
  keys = programs * options["num_keys"] * dim
  pairs = 2 * programs * options["padded_pairs"]
  return 2 * (queries + gains + keys) + pairs + 2 * rows * options["top_k"]


def _queries_grad(num_rows: int, grid: tuple[int, ...], options: dict) -> int:
  programs, dim = grid[0] * grid[1], options["key_dim"]
  rows = num_rows * options["num_heads"]
  chosen = rows * options["top_k"] * (dim + 2)
  norm = 2 * (rows + programs) * dim * int(options["has_gain"])
  return 2 * (chosen + norm + rows * dim)


def _keys_grad(num_rows: int, grid: tuple[int, ...], options: dict) -> int:
  key_blocks, shares, axes = grid
  dim, has_gain = options["key_dim"], int(options["has_gain"])
  steps = -(-num_rows // options["block_rows"])
  # Of each block of keys.
  read = num_rows * (2 * options["top_k"] + dim * (1 + has_gain))
  read += steps * dim * has_gain
  return axes * (key_blocks * read + shares * options["num_keys"] * dim)


_WORDS: dict[str, Callable[[int, tuple[int, ...], dict], int]] = {
  "top_k_kernel": _top_k,
  "topk_kernel": _topk,
  "lookup_kernel": _lookup,
  "queries_grad_kernel": _queries_grad,
  "keys_grad_kernel": _keys_grad,
}
