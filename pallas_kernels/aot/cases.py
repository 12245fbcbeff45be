"""The operators at the shapes in use, and the bytes that they have to move."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

import pallas_kernels
from pallas_kernels.aot import triton_bytes
from pallas_kernels.product_key_topk import arg_specs as search_specs
from pallas_kernels.row_update import arg_specs as update_specs
from pallas_kernels.row_update import optimizers
from pallas_kernels.sparse_gather import arg_specs as gather_specs
from pallas_kernels.top_k import arg_specs as top_k_specs


@dataclasses.dataclass(frozen=True)
class Case:
  """One operator at one shape.

  Attributes:
    name: What is computed, and the name of the shape.
    fn: Function of `arguments`, which calls the operator.
    arguments: Shapes, or trees of them.
    fused_bytes: What a kernel moves that reads every row once for each use
      and writes down nothing but its result.
    compulsory_bytes: What it moves if every distinct row is read once, for
      ids that are spread evenly.
    table_bytes: Of the largest array that must not be copied; 0 for none.
    num_rows: Integers among the arguments are below it.
    donate: Arguments that are updated in place.
  """

  name: str
  fn: Callable[..., Any]
  arguments: tuple[Any, ...]
  fused_bytes: int
  compulsory_bytes: int
  table_bytes: int = 0
  num_rows: int = 0
  donate: tuple[int, ...] = ()

  def make_arguments(self, seed: int = 0) -> tuple[Any, ...]:
    """Normal numbers, ids spread evenly, and states of an optimiser at 1."""
    rng = np.random.default_rng(seed)

    def make(x):
      if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, self.num_rows, x.shape), x.dtype)
      return jnp.asarray(rng.standard_normal(x.shape, np.float32))

    return tuple(
      jax.tree.map(lambda x: jnp.ones(x.shape), argument)
      if isinstance(argument, dict)
      else make(argument)
      for argument in self.arguments
    )


def all_cases() -> dict[str, Case]:
  """Name -> case."""
  cases = [
    *(_sums(name) for name in gather_specs.ARG_SPECS),
    *(_weights_grad(name) for name in gather_specs.ARG_SPECS),
    *(_row_grads(name) for name in gather_specs.ARG_SPECS),
    *(_update(name) for name in update_specs.ARG_SPECS),
    *(_top_k(name) for name in top_k_specs.ARG_SPECS),
    *(_search(name) for name in search_specs.ARG_SPECS),
    *(_lookup(name) for name in search_specs.ARG_SPECS),
    *(_lookup_grad(name) for name in search_specs.ARG_SPECS),
  ]
  return {case.name: case for case in cases}


def kernel_bytes(fn, *arguments) -> int:
  """Bytes that the kernels of `fn` move.

  By their cost estimates, and of those in Triton by `triton_bytes`, where what
  comes again from a cache counts again.
  """
  total = 0

  def visit(jaxpr):
    nonlocal total
    for equation in jaxpr.eqns:
      if equation.primitive.name == "pallas_call":
        total += equation.params["cost_estimate"].bytes_accessed
      elif equation.primitive.name == "triton_kernel_call":
        options = equation.params
        # Number of the argument, type, value.
        ((_, _, num_rows),) = options["scalar_args"]
        total += triton_bytes.issued_bytes(
          options["fn"].fn.__name__, num_rows, options["grid"], options
        )
      else:
        for inner in jax_core.jaxprs_in_params(equation.params):
          visit(inner)

  # A function of its own, lest jax knows the trace of another kernel.
  visit(jax.make_jaxpr(lambda *x: fn(*x))(*arguments).jaxpr)
  return total


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _gather_shapes(name: str):
  (rows, dim), reads = gather_specs.ARG_SPECS[name]
  num_reads, outputs = math.prod(reads), math.prod(reads[:-1])
  indices = _array(*reads, dtype=jnp.int32)
  return (
    (_array(rows, dim), indices, _array(*reads)),
    _array(*reads[:-1], dim),
    _bytes(rows, dim, num_reads, outputs),
  )


def _bytes(rows: int, dim: int, num_reads: int, outputs: int):
  """Of all reads, of distinct rows, of the outputs, of ids and weights."""
  distinct = rows * -math.expm1(-num_reads / rows)
  return (
    4 * num_reads * dim,
    int(4 * distinct * dim),
    4 * outputs * dim,
    8 * num_reads,
  )


def _sums(name: str) -> Case:
  arrays, _, (reads, distinct, outputs, ids) = _gather_shapes(name)
  return Case(
    f"sparse_gather/{name}",
    pallas_kernels.sparse_gather,
    arrays,
    reads + outputs + ids,
    distinct + outputs + ids,
    4 * arrays[0].size,
    arrays[0].shape[0],
  )


def _weights_grad(name: str) -> Case:
  """Forward pass and the gradient of the weights, as a training step has it."""
  arrays, output, (reads, distinct, outputs, ids) = _gather_shapes(name)

  def step(table, indices, weights, output_grad):
    output, vjp = jax.vjp(
      lambda w: pallas_kernels.sparse_gather(
        jax.lax.stop_gradient(table), indices, w
      ),
      weights,
    )
    return output, vjp(output_grad)[0]

  return Case(
    f"sparse_gather_and_weights_grad/{name}",
    step,
    (*arrays, output),
    2 * (reads + outputs + ids),
    2 * (distinct + outputs + ids),
    4 * arrays[0].size,
    arrays[0].shape[0],
  )


def _row_grads(name: str) -> Case:
  (table, *arrays), output, sizes = _gather_shapes(name)
  reads, distinct, outputs, ids = sizes

  def grads(indices, weights, output_grad):
    return pallas_kernels.sparse_gather_row_grads(
      indices, weights, output_grad, num_rows=table.shape[0]
    )

  return Case(
    f"sparse_gather_row_grads/{name}",
    grads,
    (*arrays, output),
    reads + distinct + ids,
    outputs + distinct + ids,
    num_rows=table.shape[0],
  )


def _update(name: str) -> Case:
  shape, reads = update_specs.ARG_SPECS[name]
  num_outputs = math.prod(reads[:-1])
  sizes = _bytes(*shape, math.prod(reads), num_outputs)
  all_reads, distinct, outputs, ids = sizes
  optimizer = optimizers.make_row_optimizer("rowwise_adagrad")
  state = jax.eval_shape(lambda: optimizer.init(*shape))

  def step(table, state, ids, grads, weights):
    return pallas_kernels.row_update(
      table, state, ids, grads, weights=weights, learning_rate=0.1
    )

  indices = _array(*reads, dtype=jnp.int32)
  grads = _array(*reads[:-1], shape[1])
  in_place = 2 * (distinct + distinct // shape[1])
  return Case(
    f"row_update/{name}",
    step,
    (_array(*shape), state, indices, grads, _array(*reads)),
    all_reads + in_place + ids,
    outputs + in_place + ids,
    4 * math.prod(shape),
    shape[0],
    (0, 1),
  )


def _top_k(name: str) -> Case:
  (rows, n), k = top_k_specs.ARG_SPECS[name]
  moved = 4 * rows * n + 8 * rows * k
  return Case(
    f"top_k/{name}",
    lambda x: pallas_kernels.top_k(x, k),
    (_array(rows, n),),
    moved,
    moved,
  )


def _search(name: str) -> Case:
  spec = search_specs.ARG_SPECS[name]
  rows = spec.rows * spec.num_heads
  moved = 4 * rows * (2 * spec.num_keys + 2 * spec.top_k)
  return Case(
    f"product_key_topk/{name}",
    lambda a, b: pallas_kernels.product_key_topk(a, b, spec.top_k),
    (_array(rows, spec.num_keys), _array(rows, spec.num_keys)),
    moved,
    moved,
  )


def _lookup_shapes(spec):
  return (
    _array(spec.rows, 2, spec.num_heads, spec.key_dim),
    _array(2, spec.num_heads, spec.num_keys, spec.key_dim),
    _array(2, spec.key_dim),
  )


def _lookup(name: str) -> Case:
  spec = search_specs.ARG_SPECS[name]
  arrays = _lookup_shapes(spec)
  moved = 4 * sum(x.size for x in arrays)
  moved += 8 * spec.rows * spec.num_heads * spec.top_k

  def lookup(queries, keys, gain):
    return pallas_kernels.product_key_lookup(
      queries, keys, spec.top_k, gain=gain
    )

  return Case(f"product_key_lookup/{name}", lookup, arrays, moved, moved)


def _lookup_grad(name: str) -> Case:
  """Forward and backward pass: the gradient starts from what it found."""
  spec = search_specs.ARG_SPECS[name]
  arrays = _lookup_shapes(spec)
  chosen = spec.rows * spec.num_heads * spec.top_k
  forward = 4 * sum(x.size for x in arrays) + 8 * chosen
  backward = 2 * 4 * sum(x.size for x in arrays) + 12 * chosen

  def step(queries, keys, gain, grads):
    weights, vjp, slots = jax.vjp(
      lambda q, k, g: pallas_kernels.product_key_lookup(
        q, k, spec.top_k, gain=g
      ),
      queries,
      keys,
      gain,
      has_aux=True,
    )
    return weights, slots, vjp(grads)

  grads = _array(spec.rows, spec.num_heads, spec.top_k)
  moved = forward + backward
  return Case(
    f"product_key_lookup_grad/{name}", step, (*arrays, grads), moved, moved
  )
