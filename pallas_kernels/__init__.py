"""Operators that the models spend their time in, each with several kernels.

`top_k`, `product_key_topk` and `product_key_lookup`, `sparse_gather` and
`sparse_gather_row_grads`, and `row_update`; `dispatch` says which
implementation runs. Nothing here knows of `recjax`.
"""

from pallas_kernels.dispatch import use
from pallas_kernels.product_key_topk.api import (
  product_key_lookup,
  product_key_topk,
)
from pallas_kernels.row_update.api import row_update
from pallas_kernels.sparse_gather.api import (
  sparse_gather,
  sparse_gather_row_grads,
)
from pallas_kernels.top_k.api import top_k

__all__ = [
  "product_key_lookup",
  "product_key_topk",
  "row_update",
  "sparse_gather",
  "sparse_gather_row_grads",
  "top_k",
  "use",
]
