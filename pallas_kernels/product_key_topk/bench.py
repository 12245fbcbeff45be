"""A whole product-key memory: lookup and read, forward and backward.

The peers are the package product-key-memory and the same maths in torch with
the pruned grid of candidates, eager and compiled. All project their input to
queries, and give gradients of the input and of all weights.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import Case
from pallas_kernels.product_key_topk import xla
from pallas_kernels.product_key_topk.api import product_key_lookup
from pallas_kernels.sparse_gather.api import (
  sparse_gather,
  sparse_gather_row_grads,
)

ROWS, NUM_KEYS, KEY_DIM, TOP_K = 32_768, 256, 64, 32


def _make(dim: int) -> Case:
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  x, towards = draw(ROWS, dim), draw(ROWS, dim)
  # The package draws its own weights: they are overwritten by these.
  project = draw(2 * KEY_DIM, dim) * dim**-0.5
  keys = draw(NUM_KEYS, 2, KEY_DIM) * KEY_DIM**-0.5
  values = draw(NUM_KEYS**2, dim)
  arrays = (x, project, keys, values)
  ours = jax.jit(_ours)
  device = [jnp.asarray(a) for a in (*arrays, towards)]
  eager, compiled = (_Torch(arrays, towards, c) for c in (False, True))
  return Case(
    name=f"memory {ROWS} x {dim}, {NUM_KEYS}^2 slots, k {TOP_K}",
    sides={
      "ours": lambda: jax.block_until_ready(ours(*device)),
      "product-key-memory": _Package(arrays, towards),
      "torch eager": eager,
      "torch.compile": compiled,
    },
    check=_check,
    # Input and output, their gradients, and a read of each row both ways.
    num_bytes=4.0 * (4 * ROWS * dim + 2 * NUM_KEYS**2 * dim),
    bars={"product-key-memory": 3, "torch eager": 3, "torch.compile": 3},
  )


def _ours(x, project, keys, values, towards):
  """Output, and gradients of input, projection, keys and values."""

  def look(x, project, keys):
    queries = (x @ project.T).reshape(-1, 2, 1, KEY_DIM)
    return product_key_lookup(
      queries,
      jnp.moveaxis(keys, 1, 0)[:, None],
      TOP_K,
      gain=jnp.ones((2, KEY_DIM)),
    )

  (weights, slots), vjp = jax.vjp(look, x, project, keys)
  weights, slots = weights[:, 0], slots[:, 0]
  output, weights_vjp = jax.vjp(
    lambda w: sparse_gather(jax.lax.stop_gradient(values), slots, w), weights
  )
  (weight_grads,) = weights_vjp(towards)
  zeros = np.zeros((ROWS, 1, TOP_K), jax.dtypes.float0)
  grads = vjp((weight_grads[:, None], zeros))
  rows = sparse_gather_row_grads(
    slots, weights, towards, num_rows=values.shape[0]
  )
  return output, grads, rows


class _Torch:
  """The same maths by torch's own functions."""

  def __init__(self, arrays, towards, is_compiled: bool):
    import torch

    self.torch = torch
    self.arrays = [
      torch.from_numpy(a.copy()).requires_grad_(i < 4)
      for i, a in enumerate((*arrays, towards))
    ]
    i, j = xla.candidate_pairs(TOP_K)
    self.pairs = torch.from_numpy(i), torch.from_numpy(j)
    self.forward = (
      torch.compile(self._forward) if is_compiled else self._forward
    )

  def __call__(self):
    *weights, towards = self.arrays
    for array in weights:
      array.grad = None
    output = self.forward(*weights)
    output.backward(towards)
    return output.detach(), [array.grad for array in weights]

  def _forward(self, x, project, keys, values):
    functional = self.torch.nn.functional
    queries = (x @ project.T).view(-1, 2, KEY_DIM)
    queries = functional.layer_norm(queries, (KEY_DIM,), eps=1e-6)
    scores = self.torch.einsum("bpd,npd->pbn", queries, keys)
    best, places = scores.topk(TOP_K)
    i, j = self.pairs
    sums = best[0][:, i] + best[1][:, j]
    slots = places[0][:, i] * NUM_KEYS + places[1][:, j]
    winners, at = sums.topk(TOP_K)
    return functional.embedding_bag(
      slots.gather(1, at),
      values,
      mode="sum",
      per_sample_weights=winners.softmax(dim=-1),
    )


class _Package:
  """The package's module."""

  def __init__(self, arrays, towards):
    import torch
    from product_key_memory import PKM

    x, project, keys, values = (torch.from_numpy(a.copy()) for a in arrays)
    self.x, self.towards = x.requires_grad_(), torch.from_numpy(towards)[None]
    self.module = PKM(
      x.shape[1], heads=1, num_keys=NUM_KEYS, topk=TOP_K, dim_head=KEY_DIM
    )
    self.module.norm.eps = 1e-6
    with torch.no_grad():
      self.module.to_queries.weight.copy_(project)
      self.module.keys.copy_(keys[None])
      self.module.values.weight.copy_(values)

  def __call__(self):
    module = self.module
    module.zero_grad(set_to_none=True)
    self.x.grad = None
    output = module(self.x[None])
    output.backward(self.towards)
    return output.detach()[0], [
      self.x.grad,
      module.to_queries.weight.grad,
      module.keys.grad[0],
      module.values.weight.grad,
    ]


def _check(results) -> None:
  """All but the few rows that see two nearly equal slots agree."""
  output, grads, (ids, row_grads) = results["ours"]
  dense = np.zeros((NUM_KEYS**2 + 1, output.shape[1]), np.float32)
  dense[np.asarray(ids)] = row_grads
  ours = [output, *grads, dense[:-1]]
  for label in list(results)[1:]:
    other, other_grads = results[label]
    for a, b in zip(ours, [other, *other_grads], strict=True):
      a, b = np.asarray(a), b.numpy()
      far = np.abs(a - b) > 1e-3 * (1 + np.abs(b))
      if far.mean() > 1e-3:
        raise AssertionError(f"{label}: {far.mean():.2%} of numbers differ")


cases = {f"memory {dim}": functools.partial(_make, dim) for dim in (128, 1024)}
