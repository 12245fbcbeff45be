"""`sparse_gather` and its gradients on a TPU, by Mosaic.

One bag of k rows after the other is brought into a [k, dim] buffer and summed
there, so that nothing of shape [rows, k, dim] exists. The rows come by one of
two ways:

* Row copies from HBM, those of the next bags on their way while a bag is
  summed: every read costs a row of traffic.
* From a slice of the table that lies in VMEM, where one of 128 columns or more
  fits: the table is read once, and the ids once a slice.

`row_grads` sorts the reads by id and sums neighbours, see `tpu.segments`: a
TPU has no atomics.

Tables are float32 with rows of a multiple of 128 numbers: any other would be
copied whole into such a layout at each call, and rows of 16 bits share words.
What this cannot show without a TPU: how long a copy takes, and whether issuing
them or the memory is the limit.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.tpu import layout, segments

# Most bags of rows summed in one step of the grid.
_BLOCK = 128
# Bags on their way at a time.
_IN_FLIGHT = 8
# Largest slice of a table that stays in VMEM, and all buffers of row copies.
_RESIDENT_BYTES = 40 * 2**20
_BUFFER_BYTES = 4 * 2**20
_MAX_K = 256


def sparse_gather(
  table: Float[Array, "rows dim"],
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  *,
  is_resident: bool | None = None,
) -> Float[Array, "*batch dim"]:
  """See `reference.sparse_gather`; `is_resident` None takes what fits."""
  shape = (*indices.shape[:-1], table.shape[1])
  (output,) = _sums(table, indices, weights, [], 0, is_resident)
  return output.reshape(shape)


def sparse_gather_gated(
  table: Float[Array, "rows dim"],
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  gate: Float[Array, "*batch dim"],
  *,
  with_tanh: bool,
  is_resident: bool | None = None,
) -> list[Float[Array, "*batch dim"]]:
  """See `reference.sparse_gather_gated`."""
  gates = [gate.reshape(-1, table.shape[1])]
  outputs = _sums(table, indices, weights, gates, 1 + with_tanh, is_resident)
  return [x.reshape(gate.shape) for x in outputs]


def weights_grad(
  table: Float[Array, "rows dim"],
  indices: Int[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
  *,
  is_resident: bool | None = None,
) -> list[Float[Array, "*batch _"]]:
  """See `reference.weights_grad`."""
  plan = _Plan(table, indices, is_resident)
  call = plan.call(
    "sparse_gather_weights_grad",
    _weights_grad_kernel,
    in_specs=[plan.row_spec()],
    # Slices of the features give parts of the products.
    out_specs=[
      pl.BlockSpec((None, plan.block, plan.k), lambda d, r: (d, r, 0))
    ],
    out_shapes=[(plan.num_slices, plan.num_bags, plan.k)],
    flops=2 * indices.size * plan.dim,
  )
  grads = output_grad.reshape(plan.num_bags, plan.dim)
  (parts,) = call(plan.ids(indices), table, grads)
  products = parts.sum(0).reshape(indices.shape)
  # What comes back waits for the read: see `api.sparse_gather`, `tap`.
  return list(jax.lax.optimization_barrier((products, output_grad)))


def row_grads(
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
  *,
  num_rows: int,
) -> tuple[Int[Array, " rows"], Float[Array, "rows dim"]]:
  """See `api.sparse_gather_row_grads`."""
  reads = segments.sort_reads(indices, weights, num_rows=num_rows)
  dim = output_grad.shape[-1]
  return reads.unique, segments.sum_by_id(reads, output_grad.reshape(-1, dim))


def _sums(table, indices, weights, gates, num_gated, is_resident):
  """Weighted sums or, with a gate, `num_gated` results made of them."""
  plan = _Plan(table, indices, is_resident)
  call = plan.call(
    "sparse_gather",
    functools.partial(_sums_kernel, has_gate=bool(gates)),
    in_specs=[
      pl.BlockSpec((plan.block, plan.k), lambda d, r: (r, 0)),
      *(plan.row_spec() for _ in gates),
    ],
    out_specs=[plan.row_spec()] * max(1, num_gated),
    out_shapes=[(plan.num_bags, plan.dim)] * max(1, num_gated),
    flops=2 * indices.size * plan.dim,
  )
  weights = weights.reshape(plan.num_bags, plan.k)
  return call(plan.ids(indices), table, weights, *gates)


class _Plan:
  """How the bags and the features are cut, and where the table lies."""

  def __init__(self, table, indices, is_resident):
    segments.check_dim(table)
    if not indices.size or not table.shape[0] or indices.shape[-1] > _MAX_K:
      raise NotImplementedError(
        f"pallas_tpu takes 1 to {_MAX_K} reads a sum from a table that is not "
        f"empty; got indices of shape {indices.shape}"
      )
    self.num_rows, self.dim = table.shape
    self.k = indices.shape[-1]
    self.num_bags = math.prod(indices.shape[:-1])
    self.block = min(_BLOCK, 8 * pl.cdiv(self.num_bags, 8))
    self.num_blocks = pl.cdiv(self.num_bags, self.block)
    column_bytes = 4 * pl.cdiv(self.num_rows, 8) * 8
    if is_resident is None:
      is_resident = column_bytes * segments.LANES <= _RESIDENT_BYTES
    self.is_resident = is_resident
    bag_bytes = 4 * pl.cdiv(self.k, 8) * 8
    self.width = (
      _widest(self.dim, _RESIDENT_BYTES // column_bytes)
      if is_resident
      else _widest(self.dim, _BUFFER_BYTES // (2 * bag_bytes))
    )
    self.num_slices = self.dim // self.width
    self.in_flight = 1
    if not is_resident:
      most = _BUFFER_BYTES // (bag_bytes * self.width)
      self.in_flight = max(2, min(_IN_FLIGHT, most))

  def ids(self, indices):
    """[num_blocks, 1, block * k]; what is filled up reads nothing."""
    flat = indices.reshape(-1)
    missing = self.num_blocks * self.block * self.k - flat.size
    flat = jnp.pad(flat, (0, missing), constant_values=-1)
    return flat.reshape(self.num_blocks, 1, -1)

  def row_spec(self):
    return pl.BlockSpec((self.block, self.width), lambda d, r: (r, d))

  def call(self, name, kernel, *, in_specs, out_specs, out_shapes, flops):
    ids_spec = pl.BlockSpec(
      (None, 1, self.block * self.k),
      lambda d, r: (r, 0, 0),
      memory_space=pltpu.SMEM,
    )
    table_spec = pl.BlockSpec(memory_space=pl.ANY)
    if self.is_resident:
      table_spec = pl.BlockSpec(
        (self.num_rows, self.width),
        lambda d, r: (0, d),
        pipeline_mode=pl.Buffered(1),
      )
    return pl.pallas_call(
      functools.partial(kernel, plan=self),
      grid=(self.num_slices, self.num_blocks),
      in_specs=[ids_spec, table_spec, *in_specs],
      out_specs=out_specs,
      out_shape=[
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in out_shapes
      ],
      scratch_shapes=[
        pltpu.VMEM((self.in_flight, self.k, self.width), jnp.float32),
        pltpu.SemaphoreType.DMA((self.in_flight,)),
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("arbitrary", "arbitrary"),
        vmem_limit_bytes=64 * 2**20,
      ),
      cost_estimate=self.cost(in_specs, out_specs, flops),
      interpret=dispatch.interpret_mode(),
      name=name,
    )

  def cost(self, in_specs, out_specs, flops):
    """What the grid copies: a block each time that its index changes."""
    steps = self.num_slices * self.num_blocks
    blocks = [spec.block_shape for spec in (*in_specs, *out_specs)]
    streamed = sum(math.prod(n or 1 for n in block) for block in blocks)
    ids = self.block * self.k
    rows = self.num_rows * self.dim
    if not self.is_resident:
      rows = self.num_bags * self.k * self.dim
    return pl.CostEstimate(
      flops=flops,
      bytes_accessed=4 * (steps * (streamed + ids) + rows),
      transcendentals=0,
    )


def _widest(dim: int, limit: int) -> int:
  """Most columns that divide `dim`, are whole lanes and within the limit."""
  columns = [
    n
    for n in range(segments.LANES, dim + 1, segments.LANES)
    if not dim % n and n <= limit
  ]
  return max(columns, default=segments.LANES)


def _sums_kernel(ids_ref, table_ref, weights_ref, *refs, plan, has_gate):
  *others, buffer, semaphores = refs
  gate_ref = others.pop(0) if has_gate else None
  sums_ref = others[-1]

  def visit(bag, rows):
    weights = layout.to_column(weights_ref[pl.ds(bag, 1), :])
    sums_ref[pl.ds(bag, 1), :] = jnp.sum(weights * rows, 0, keepdims=True)

  _visit_bags(visit, ids_ref, table_ref, buffer, semaphores, plan)
  if has_gate:
    tanh = jnp.tanh(sums_ref[...])
    sums_ref[...] = tanh
    others[0][...] = gate_ref[...] * tanh


def _weights_grad_kernel(
  ids_ref, table_ref, grads_ref, parts_ref, buffer, semaphores, *, plan
):
  def visit(bag, rows):
    products = grads_ref[pl.ds(bag, 1), :] * rows
    column = jnp.sum(products, 1, keepdims=True)
    parts_ref[pl.ds(bag, 1), :] = layout.to_row(column)

  _visit_bags(visit, ids_ref, table_ref, buffer, semaphores, plan)


def _visit_bags(visit, ids_ref, table_ref, buffer, semaphores, plan):
  """Calls `visit(bag, its [k, width] rows)` for each bag of the block."""
  k, width = plan.k, plan.width
  columns = pl.ds(pl.program_id(0) * width, width)

  def each_read(bag, body):
    """`body(place in the bag, id, is valid)` for its reads."""

    def step(j, _):
      index = ids_ref[0, bag * k + j]
      body(j, index, (index >= 0) & (index < plan.num_rows))

    jax.lax.fori_loop(0, k, step, None, unroll=math.gcd(k, 8))

  def copy(slot, j, index):
    return pltpu.make_async_copy(
      table_ref.at[pl.ds(index, 1), columns],
      buffer.at[slot, pl.ds(j, 1), :],
      semaphores.at[slot],
    )

  def fetch(bag):
    slot = jax.lax.rem(bag, plan.in_flight)

    def start(j, index, is_valid):
      @pl.when(is_valid)
      def _():
        if plan.is_resident:
          buffer[slot, pl.ds(j, 1), :] = table_ref[pl.ds(index, 1), :]
        else:
          copy(slot, j, index).start()

      @pl.when(~is_valid)
      def _():
        buffer[slot, pl.ds(j, 1), :] = jnp.zeros((1, width), jnp.float32)

    each_read(bag, start)

  def wait(bag):
    slot = jax.lax.rem(bag, plan.in_flight)

    def one(j, index, is_valid):
      @pl.when(is_valid)
      def _():
        copy(slot, j, index).wait()

    if not plan.is_resident:
      each_read(bag, one)
    return buffer[slot]

  ahead = plan.in_flight - 1
  for bag in range(min(ahead, plan.block)):
    fetch(bag)

  @pl.loop(0, plan.block)
  def _(bag):
    @pl.when(bag + ahead < plan.block)
    def _():
      fetch(bag + ahead)

    visit(bag, wait(bag))
