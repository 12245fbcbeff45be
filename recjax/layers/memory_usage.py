"""How evenly a memory's slots are used: retrieval collapse made visible.

`count` runs inside the model and returns sums that add over batches and
devices; `summarize` turns the sums into numbers to log. A perplexity below 5 %
of the slots is called collapse here (our choice; MSN, arXiv 2602.07526, shows
a histogram only).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

COLLAPSE_PERPLEXITY = 0.05


def count(
  reads: dict[str, Array],
  value: Float[Array, "tokens batch dim"],
  example_mask: Bool[Array, " batch"],
  *,
  num_slots: int,
) -> dict[str, Array]:
  """Sums over the valid examples of one batch.

  Args:
    reads: `slots` and `weights`, `[tokens, batch, heads, top_k]`.
    value: Output of the memory.
    example_mask: False for padding.
    num_slots: Slots of the memory.

  Returns:
    `hits` per slot, and sums with their counts for the largest softmax weight
    and |tanh(value)|.
  """
  mask = example_mask.astype(jnp.float32)[None, :, None]
  slots: Int[Array, ...] = jnp.where(
    example_mask[None, :, None, None], reads["slots"], num_slots
  )
  hits = jnp.zeros((num_slots,), jnp.int32).at[slots.reshape(-1)].add(1)
  max_weight = reads["weights"].max(axis=-1)
  gate = jnp.abs(jnp.tanh(value))
  return {
    "hits": hits,
    "max_weight_sum": jnp.sum(max_weight * mask),
    "searches": jnp.sum(jnp.broadcast_to(mask, max_weight.shape)),
    "gate_sum": jnp.sum(gate * mask),
    "gates": jnp.sum(jnp.broadcast_to(mask, gate.shape)),
  }


def summarize(counts: dict[str, Any]) -> dict[str, float]:
  """Numbers that tell an even use from a collapse.

  Args:
    counts: Added results of `count`.

  Returns:
    `slots_hit`: share of slots read at least once. `perplexity`: exp(entropy
    of the hits) over the number of slots, 1 if even. `kl_uniform`: log(slots)
    - entropy, in nats. `top1pct_share`: share of the hits that the busiest 1 %
    of the slots take. `dead_rows`, `dead_cols`: share of sub-keys of either
    axis never used. `max_weight`: mean largest softmax weight. `gate`: mean
    |tanh(v_o)|. `collapsed`: 1 if the perplexity is below 0.05.
  """
  hits = np.asarray(counts["hits"], np.float64)
  num_slots = hits.size
  total = max(hits.sum(), 1.0)
  share = hits / total
  used = share[share > 0]
  entropy = float(-(used * np.log(used)).sum())
  busiest = np.sort(share)[::-1][: max(1, num_slots // 100)]
  grid = hits.reshape(int(np.sqrt(num_slots)), -1)
  perplexity = float(np.exp(entropy)) / num_slots
  return {
    "slots_hit": float((hits > 0).mean()),
    "perplexity": perplexity,
    "kl_uniform": float(np.log(num_slots)) - entropy,
    "top1pct_share": float(busiest.sum()),
    "dead_rows": float((grid.sum(axis=1) == 0).mean()),
    "dead_cols": float((grid.sum(axis=0) == 0).mean()),
    "max_weight": float(counts["max_weight_sum"])
    / max(float(counts["searches"]), 1.0),
    "gate": float(counts["gate_sum"]) / max(float(counts["gates"]), 1.0),
    "collapsed": float(0 < perplexity < COLLAPSE_PERPLEXITY and hits.any()),
  }


def slot_histogram(counts: dict[str, Any]) -> list[int]:
  """Hits of all slots, busiest first."""
  return sorted((int(h) for h in jax.device_get(counts["hits"])), reverse=True)
