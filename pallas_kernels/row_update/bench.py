"""A whole sparse step: read bags, take a gradient, row-wise Adagrad.

The peers: FBGEMM's exact row-wise Adagrad, the same step; torch's sparse
gradient with its Adagrad, which keeps a number an entry; and optax's Adagrad on
the dense gradient. The loss is half the squared distance of the bags to given
ones, so that its gradient is a difference. The rows of 100,000 and 10,000,000
show how the step grows with the table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels.bench import Case
from pallas_kernels.row_update.api import row_update
from pallas_kernels.sparse_gather.api import sparse_gather

DIM, BATCH, K, RATE, EPS = 64, 4096, 32, 0.05, 1e-8
# The table that all peers meet; FBGEMM meets the others as well.
NUM_ROWS = 1_000_000


def _make(num_rows: int, distribution: str) -> Case:
  rng = np.random.default_rng(0)
  ids = _ids(rng, num_rows, distribution)
  weights = rng.random((BATCH, K), np.float32)
  targets = rng.standard_normal((BATCH, DIM), np.float32)
  table = rng.standard_normal((num_rows, DIM), np.float32)
  sides = {
    "ours": _Ours(table, ids, weights, targets),
    "fbgemm": _Fbgemm(table, ids, weights, targets),
  }
  if num_rows == NUM_ROWS:
    sides["torch sparse Adagrad"] = _Torch(table, ids, weights, targets)
    sides["optax dense Adagrad"] = _Optax(table, ids, weights, targets)

  def check(results):
    """Bags of all, and the rows after a step of those with one rule."""
    output, row = results["ours"]
    for label, (other, other_row) in results.items():
      np.testing.assert_allclose(
        output, other, rtol=1e-3, atol=1e-4, err_msg=label
      )
      if label == "fbgemm":
        np.testing.assert_allclose(row, other_row, rtol=1e-3, atol=1e-5)

  num_distinct = len(np.unique(ids))
  return Case(
    name=f"sparse step {num_rows:,} x {DIM}, {BATCH} x {K} {distribution}",
    sides=sides,
    check=check,
    # Each row read twice and written once, its state, ids and weights, bags.
    num_bytes=4.0
    * (num_distinct * (3 * DIM + 2) + 4 * BATCH * K + 2 * BATCH * DIM),
    bars={
      "fbgemm": 1.0,
      "torch sparse Adagrad": 5.0,
      "optax dense Adagrad": 5.0,
    },
  )


def _ids(rng, num_rows: int, distribution: str) -> np.ndarray:
  if distribution == "uniform":
    return rng.integers(0, num_rows, (BATCH, K)).astype(np.int32)
  # Zipf's law on all rows, popular ones anywhere in the table.
  share = np.arange(1.0, num_rows + 1) ** -1.05
  drawn = rng.choice(num_rows, (BATCH, K), p=share / share.sum())
  return rng.permutation(num_rows)[drawn].astype(np.int32)


class _Ours:
  """Gather and update by the kernels, table and state donated."""

  def __init__(self, table, ids, weights, targets):
    self.first = int(ids[0, 0])
    self.state = jnp.asarray(table), {"sum": jnp.zeros(len(table))}
    self.inputs = [jnp.asarray(x) for x in (ids, weights, targets)]
    self.step = jax.jit(self._step, donate_argnums=(0, 1))

  def __call__(self):
    *state, output = self.step(*self.state, *self.inputs)
    self.state = jax.block_until_ready(state)
    return output, np.asarray(self.state[0][self.first])

  @staticmethod
  def _step(table, state, ids, weights, targets):
    output = sparse_gather(jax.lax.stop_gradient(table), ids, weights)
    table, state = row_update(
      table,
      state,
      ids,
      output - targets,
      weights=weights,
      learning_rate=RATE,
      eps=EPS,
    )
    return table, state, output


class _Fbgemm:
  """Split table-batched embedding bags."""

  def __init__(self, table, ids, weights, targets):
    import torch
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
      EmbeddingLocation,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
      ComputeDevice,
      OptimType,
      SplitTableBatchedEmbeddingBagsCodegen,
    )

    self.first = int(ids[0, 0])
    self.bags = SplitTableBatchedEmbeddingBagsCodegen(
      [(*table.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
      optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
      learning_rate=RATE,
      eps=EPS,
    )
    self.table = self.bags.split_embedding_weights()[0]
    self.table.copy_(torch.from_numpy(table))
    self.ids = torch.from_numpy(ids.reshape(-1)).long()
    self.offsets = torch.arange(0, BATCH * K + 1, K)
    self.weights = torch.from_numpy(weights.reshape(-1))
    self.targets = torch.from_numpy(targets)

  def __call__(self):
    output = self.bags(self.ids, self.offsets, per_sample_weights=self.weights)
    output.backward(output.detach() - self.targets)
    return output.detach().numpy(), self.table[self.first].numpy().copy()


class _Torch:
  """`embedding` with a sparse gradient."""

  def __init__(self, table, ids, weights, targets):
    import torch

    self.first = int(ids[0, 0])
    self.table = torch.from_numpy(table.copy()).requires_grad_()
    self.ids, self.weights = map(torch.from_numpy, (ids.astype(int), weights))
    self.targets = torch.from_numpy(targets)
    self.optimizer = torch.optim.Adagrad([self.table], lr=RATE, eps=EPS)

  def __call__(self):
    import torch

    self.table.grad = None
    # A bag with weights has no sparse gradient in torch.
    rows = torch.nn.functional.embedding(self.ids, self.table, sparse=True)
    output = torch.einsum("bk,bkd->bd", self.weights, rows)
    output.backward(output.detach() - self.targets)
    self.optimizer.step()
    return output.detach().numpy(), None


class _Optax:
  """What plain JAX code does: a gradient and a sweep of the table's size."""

  def __init__(self, table, ids, weights, targets):
    self.inputs = [jnp.asarray(x) for x in (ids, weights, targets)]
    self.optimizer = optax.adagrad(RATE, eps=EPS)
    table = jnp.asarray(table)
    self.state = table, self.optimizer.init(table)
    self.step = jax.jit(self._step, donate_argnums=(0, 1))

  def __call__(self):
    *state, output = self.step(*self.state, *self.inputs)
    self.state = jax.block_until_ready(state)
    return output, None

  def _step(self, table, state, ids, weights, targets):
    def read(table):
      return jnp.einsum("bk,bkd->bd", weights, table[ids])

    output, vjp = jax.vjp(read, table)
    updates, state = self.optimizer.update(*vjp(output - targets), state, table)
    return optax.apply_updates(table, updates), state, output


cases = {
  f"{num_rows} {distribution}": functools.partial(_make, num_rows, distribution)
  for num_rows, distribution in (
    (NUM_ROWS, "uniform"),
    (NUM_ROWS, "Zipf"),
    (100_000, "uniform"),
    (10_000_000, "uniform"),
  )
}
