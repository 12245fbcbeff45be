"""`top_k` beside `torch.topk` and `jax.lax.top_k`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import Case
from pallas_kernels.top_k.api import top_k
from pallas_kernels.top_k.arg_specs import ARG_SPECS


def _make(name: str, dtype: str) -> Case:
  import torch

  shape, k = ARG_SPECS[name]
  x = np.random.default_rng(0).standard_normal(shape, np.float32)
  own = jnp.asarray(x).astype(dtype)
  # What was rounded to bfloat16 once is the same number everywhere.
  other = torch.from_numpy(np.array(own.astype(jnp.float32)))
  other = other.to(getattr(torch, dtype))
  run = jax.jit(functools.partial(top_k, k=k, implementation="cpu"))
  lax = jax.jit(functools.partial(jax.lax.top_k, k=k))

  sides = {
    "ours": lambda: jax.block_until_ready(run(own)),
    "torch.topk": lambda: torch.topk(other, k),
  }
  # It sorts whole rows of bfloat16: a minute for the largest case.
  if dtype == "float32" or shape[1] <= 1024:
    sides["lax.top_k"] = lambda: jax.block_until_ready(lax(own))

  def check(results):
    values, indices = results["ours"]
    if "lax.top_k" in results:
      np.testing.assert_array_equal(indices, results["lax.top_k"][1])
    np.testing.assert_array_equal(
      np.float32(values), results["torch.topk"][0].float().numpy()
    )

  return Case(
    name=f"top_k {shape[0]} x {shape[1]}, k {k}, {dtype}",
    sides=sides,
    check=check,
    num_bytes=own.nbytes + shape[0] * k * (own.itemsize + 4),
    bars={"torch.topk": 1.4, "lax.top_k": {1: 1.5, 2: 2.5}},
  )


cases = {
  f"{name} {dtype}": functools.partial(_make, name, dtype)
  for name in ("rows_4096x1024", "rows_4096x65536", "rows_512x256")
  for dtype in ("float32", "bfloat16")
}
