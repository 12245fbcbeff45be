"""The product-key memory of MSN in PyTorch; see `torch_rankmixer`."""

import torch
import torch.nn.functional as F
from torch import nn

from recjax.layers.product_key_memory import MemoryConfig

EPS = 1e-6  # Of a LayerNorm.


class ProductKeyMemory(nn.Module):
  """Weighted sum of the `top_k` best slots of every token."""

  def __init__(self, config: MemoryConfig, query: nn.Module):
    super().__init__()
    self.num_keys, self.top_k = config.num_keys, config.top_k
    self.query = query
    dim = config.key_dim
    for axis in ("row", "col"):
      for name, shape in (
        ("keys", (1, config.num_keys, dim)),
        ("theta", (1, dim, dim)),
        ("query_gain", (dim,)),
        ("key_gain", (dim,)),
      ):
        self.register_parameter(
          f"{axis}_{name}", nn.Parameter(torch.zeros(shape))
        )
    # Of two sorted lists, pair (i, j), counted from 1, is beaten or matched by
    # i * j - 1 others.
    places = torch.arange(1, config.top_k + 1)
    pairs = torch.nonzero(places[:, None] * places <= config.top_k)
    self.register_buffer("first", pairs[:, 0].contiguous())
    self.register_buffer("second", pairs[:, 1].contiguous())

  def forward(self, x: torch.Tensor, values: torch.Tensor):
    """What the memory says of `x` (`[tokens, batch, dim]`), slots, weights."""
    keys = self._keys()
    queries = self.query(x).view(-1, 2, keys.shape[-1]).transpose(0, 1)
    queries = F.layer_norm(queries, keys.shape[-1:], eps=EPS)
    scores = torch.bmm(queries, keys.transpose(1, 2))
    # The search needs no gradient: it ends in two rows of numbers to gather.
    found = self._search(scores.detach())
    weights = scores.gather(-1, found).sum(dim=0).softmax(dim=-1)
    slots = (found[0] * self.num_keys + found[1]).int()
    output = F.embedding_bag(
      slots, values, mode="sum", per_sample_weights=weights
    )
    return output.view(x.shape), slots, weights

  def _keys(self) -> torch.Tensor:
    """Keys of both axes; the gain of the queries is in them, as it is less."""
    keys = torch.cat([self.row_keys, self.col_keys])
    keys = torch.bmm(keys, torch.cat([self.row_theta, self.col_theta]))
    row_gain = self.row_key_gain * self.row_query_gain
    col_gain = self.col_key_gain * self.col_query_gain
    keys = F.layer_norm(keys, keys.shape[-1:], eps=EPS)
    return keys * torch.stack([row_gain, col_gain])[:, None]

  @torch.no_grad()
  def _search(self, scores: torch.Tensor) -> torch.Tensor:
    """Row and column of the best slots, `[2, searches, top_k]`."""
    best, found = scores.topk(self.top_k, dim=-1)
    sums = best[0].index_select(-1, self.first)
    sums += best[1].index_select(-1, self.second)
    winners = sums.topk(self.top_k, dim=-1).indices
    places = torch.stack([self.first[winners], self.second[winners]])
    return found.gather(-1, places)
