"""`sparse_gather` and its gradients beside the bags of torch and FBGEMM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import Case
from pallas_kernels.sparse_gather.api import (
  sparse_gather,
  sparse_gather_row_grads,
)


class Bag:
  """Inputs of a bag, for every library."""

  def __init__(self, num_rows: int, dim: int, num_bags: int, k: int):
    import torch

    rng = np.random.default_rng(0)
    self.shape = (num_rows, dim, num_bags, k)
    table = rng.random((num_rows, dim), np.float32)
    indices = rng.integers(0, num_rows, (num_bags, k)).astype(np.int32)
    weights = rng.random((num_bags, k), np.float32)
    grad = rng.random((num_bags, dim), np.float32)
    # One memory for all: NumPy's has huge pages, with which every library is
    # twice as fast, and jax's and torch's have not.
    self.own = tuple(jnp.array(x) for x in (table, indices, weights, grad))
    self.torch = tuple(torch.from_dlpack(x) for x in self.own)
    self.num_bytes = num_bags * k * (4 * dim + 8) + num_bags * dim * 4

  def fbgemm(self):
    """Its arguments for one table: forward, and gradient of the weights."""
    import fbgemm_gpu  # noqa: F401
    import torch

    num_rows, dim, num_bags, k = self.shape
    table, indices, weights, grad = self.torch
    first = torch.zeros(1, dtype=torch.int64)
    dims = torch.tensor([0, dim], dtype=torch.int32)
    rows = torch.tensor([0, num_rows])
    offsets = torch.arange(0, num_bags * k + 1, k, dtype=torch.int32)
    where = (indices.reshape(-1), offsets)
    flat = table.reshape(-1)
    ops = torch.ops.fbgemm

    def forward():
      return ops.split_embedding_codegen_forward_cpu(
        flat, first, dims, dim, rows, *where, 0, weights.reshape(-1), 0
      )

    def backward():
      ones = torch.ones(1, dtype=torch.int32)
      return ops.split_embedding_codegen_grad_indice_weights_cpu(
        grad, flat, first, dims, *where, ones
      ).reshape(num_bags, k)

    return forward, backward


def _forward(*shape: int) -> Case:
  import torch

  bag = Bag(*shape)
  table, indices, weights, _ = bag.torch
  cpu, xla = (
    jax.jit(functools.partial(sparse_gather, implementation=name))
    for name in ("cpu", "xla")
  )

  def run_torch():
    with torch.no_grad():
      return torch.nn.functional.embedding_bag(
        indices, table, per_sample_weights=weights, mode="sum"
      )

  sides = {
    "ours": lambda: jax.block_until_ready(cpu(*bag.own[:3])),
    "torch.embedding_bag": run_torch,
    "fbgemm": bag.fbgemm()[0],
    "xla": lambda: jax.block_until_ready(xla(*bag.own[:3])),
  }
  return Case(
    name="bag {} x {}, {} x {}, forward".format(*shape),
    sides=sides,
    check=_equal,
    num_bytes=bag.num_bytes,
    bars={"torch.embedding_bag": 1.0, "fbgemm": 1.0},
  )


def _with_gradient(*shape: int) -> Case:
  import torch

  bag = Bag(*shape)
  table, indices, _, grad = bag.torch
  weights = bag.torch[2].clone().requires_grad_()

  def make(name):
    @jax.jit
    def run(table, indices, weights, grad):
      output, pull = jax.vjp(
        lambda w: sparse_gather(table, indices, w, implementation=name), weights
      )
      return output, *pull(grad)

    return lambda: jax.block_until_ready(run(*bag.own))

  def run_torch():
    weights.grad = None
    output = torch.nn.functional.embedding_bag(
      indices, table, per_sample_weights=weights, mode="sum"
    )
    output.backward(grad)
    return output.detach(), weights.grad

  forward, backward = bag.fbgemm()
  return Case(
    name="bag {} x {}, {} x {}, with gradient".format(*shape),
    sides={
      "ours": make("cpu"),
      "torch.embedding_bag": run_torch,
      "fbgemm": lambda: (forward(), backward()),
      "xla": make("xla"),
    },
    check=_equal,
    num_bytes=2 * bag.num_bytes,
    bars={"torch.embedding_bag": 1.0, "fbgemm": 1.0},
  )


def _row_grads(*shape: int) -> Case:
  import torch

  bag = Bag(*shape)
  num_rows = shape[0]
  _, indices, weights, grad = bag.torch
  cpu, xla = (
    jax.jit(
      functools.partial(
        sparse_gather_row_grads, num_rows=num_rows, implementation=name
      )
    )
    for name in ("cpu", "xla")
  )
  table = torch.zeros(shape[:2], requires_grad=True)

  def run_torch():
    # Dense: torch has no sparse gradient with weights.
    table.grad = None
    torch.nn.functional.embedding_bag(
      indices, table, per_sample_weights=weights, mode="sum"
    ).backward(grad)
    return table.grad

  def check(results):
    ids, grads = (np.asarray(x) for x in results["ours"])
    _close(results["xla"][0], ids)
    _close(results["xla"][1], grads)
    used = ids < num_rows
    _close(results["torch dense"].numpy()[ids[used]], grads[used])

  distinct = len(np.unique(bag.own[1]))
  return Case(
    name="row grads {} x {}, {} x {}".format(*shape),
    sides={
      "ours": lambda: jax.block_until_ready(cpu(*bag.own[1:])),
      "xla": lambda: jax.block_until_ready(xla(*bag.own[1:])),
      "torch dense": run_torch,
    },
    check=check,
    num_bytes=bag.num_bytes + distinct * shape[1] * 4,
    bars={"xla": 1.0},
  )


def _close(x, y) -> None:
  np.testing.assert_allclose(np.asarray(x), y, rtol=2e-4, atol=2e-4)


def _equal(results) -> None:
  first, *others = (
    [np.asarray(x) for x in (r if isinstance(r, tuple) else (r,))]
    for r in results.values()
  )
  for other in others:
    for x, y in zip(other, first, strict=True):
      _close(x, y)


BAGS = ((1_000_000, 64, 4096, 32), (1_000_000, 128, 4096, 32))
# Of the row gradients: the values of MSN's memory at paper size.
MEMORIES = ((65536, 128, 32768, 32),)
cases = {
  f"{kind} {shape[0]}x{shape[1]}": functools.partial(make, *shape)
  for kind, make, shapes in (
    ("forward", _forward, BAGS),
    ("gradient", _with_gradient, BAGS),
    ("rows", _row_grads, MEMORIES),
  )
  for shape in shapes
}
