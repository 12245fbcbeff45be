"""Shapes of the searches in use."""

from typing import NamedTuple


class ArgSpec(NamedTuple):
  """Sizes of one search: `rows` are queries, of `num_heads` heads each."""

  rows: int
  num_heads: int
  num_keys: int
  key_dim: int
  top_k: int


ARG_SPECS = {
  "msn_base": ArgSpec(8 * 512, 1, 64, 32, 16),
  "msn_paper": ArgSpec(16 * 2048, 1, 256, 64, 32),
  "msn_paper_1024": ArgSpec(16 * 2048, 1, 1024, 64, 32),
  "heads_4": ArgSpec(2048, 4, 128, 32, 32),
}
