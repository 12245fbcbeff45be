"""Sums over the reads of each row, on a TPU: reads sorted by id, no atomics.

A TPU has no atomic addition, and XLA's scatter adds one row after the other.
Here the reads are sorted by the row that they name, each brings the gradient
of its output in by a copy of its own, and neighbours of one id are summed in
registers. Sums leave in groups of eight rows, as many as a register holds.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch

LANES = 128
GROUP = 8
# Reads of one step of the grid, and gradients on their way.
_BLOCK = 512
_IN_FLIGHT = 32
# Groups that may be open: rows are begun as early as their gradients.
SLOTS = _IN_FLIGHT // GROUP + 2


class SortedReads(NamedTuple):
  """Reads in the order of their ids.

  Attributes:
    unique: [rows] each id once, ascending, and `num_rows` behind the last;
      there is room for all reads, or for all rows if these are fewer.
    scalars: Cut into blocks, for SMEM: whether a read is the first (bit 0) and
      the last (bit 1) of its id or out of range (-1), its output, its id, and
      its weight if there are weights.
    block: Reads of a block.
  """

  unique: Int[Array, " rows"]
  scalars: list[Array]
  block: int

  @property
  def num_blocks(self) -> int:
    return self.scalars[0].shape[0]

  def specs(self) -> list[pl.BlockSpec]:
    """Of `scalars`."""
    spec = pl.BlockSpec(
      (None, 1, self.block), lambda i, *_: (i, 0, 0), memory_space=pltpu.SMEM
    )
    return [spec for _ in self.scalars]


def sort_reads(
  ids: Int[Array, "*reads"],
  weights: Float[Array, "*reads"] | None,
  *,
  num_rows: int,
) -> SortedReads:
  """Sorts reads by id.

  Args:
    ids: [*n] rows, or [*n, k] with weights; those out of range are dropped.
    weights: Of the reads; None is one.
    num_rows: Ids are below it.
  """
  k = 1 if weights is None else ids.shape[-1]
  ids = ids.reshape(-1)
  num_reads = ids.size
  ids = jnp.where((ids < 0) | (ids >= num_rows), num_rows, ids)
  places = jax.lax.iota(jnp.int32, num_reads)
  payload = (places,) if weights is None else (places, weights.reshape(-1))
  # Weights go through the sort: a gather of single numbers costs more.
  ids, places, *weights = jax.lax.sort(
    (ids, *payload), num_keys=1, is_stable=False
  )
  is_valid = ids < num_rows
  edge = ids[1:] != ids[:-1]
  ends = jnp.ones((1,), bool)
  is_first = jnp.concatenate([ends, edge]) & is_valid
  is_last = jnp.concatenate([edge, ends])
  marks = (is_last.astype(jnp.int32) << 1) | is_first
  marks = jnp.where(is_valid, marks, -1)
  unique = jnp.where(is_first, ids, num_rows)
  unique = jax.lax.sort(unique, is_stable=False)[: min(num_reads, num_rows)]

  block = min(_BLOCK, GROUP * pl.cdiv(num_reads, GROUP))
  num_blocks = pl.cdiv(num_reads, block)

  def cut(x, fill):
    x = jnp.pad(x, (0, num_blocks * block - num_reads), constant_values=fill)
    return x.reshape(num_blocks, 1, block)

  scalars = [cut(marks, -1), cut(places // k, 0), cut(ids, 0)]
  scalars += [cut(w, 0) for w in weights]
  return SortedReads(unique, scalars, block)


def sum_by_id(
  reads: SortedReads, grads: Float[Array, "outputs dim"]
) -> Float[Array, "rows dim"]:
  """Sums of the gradients by id, in the order of `reads.unique`, then zeros."""
  dim = check_dim(grads)
  size = reads.unique.size
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  scalars = reads.scalars
  return pl.pallas_call(
    functools.partial(_sum_kernel, block=reads.block, num_scalars=len(scalars)),
    grid=(reads.num_blocks,),
    in_specs=[*reads.specs(), anywhere, anywhere],
    out_specs=anywhere,
    out_shape=jax.ShapeDtypeStruct((size, dim), jnp.float32),
    input_output_aliases={len(scalars) + 1: 0},
    scratch_shapes=[
      *scratch_shapes(dim),
      pltpu.SemaphoreType.DMA((SLOTS,)),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    cost_estimate=pl.CostEstimate(
      flops=2 * scalars[0].size * dim,
      bytes_accessed=read_bytes(reads, dim) + 4 * size * dim,
      transcendentals=0,
    ),
    interpret=dispatch.interpret_mode(),
    name="sum_by_id",
  )(*scalars, grads, jnp.zeros((size, dim), jnp.float32))


def read_bytes(reads: SortedReads, dim: int) -> int:
  """Bytes that come in with the reads: a row and the scalars of each."""
  return 4 * reads.scalars[0].size * (dim + len(reads.scalars))


def check_dim(rows: Array) -> int:
  """The dim of float32 rows that copies can move."""
  if rows.dtype != jnp.float32 or rows.shape[-1] % LANES:
    raise NotImplementedError(
      "pallas_tpu takes float32 tables whose rows are a multiple of "
      f"{LANES} numbers, for any other is copied whole at each call; got "
      f"{rows.dtype} rows of {rows.shape[-1]}"
    )
  return rows.shape[-1]


def _sum_kernel(*refs, block, num_scalars):
  scalars, refs = refs[:num_scalars], refs[num_scalars:]
  grads_ref, _, sums_ref, *scratch, semaphores = refs
  staged_ref = scratch[_STAGED]

  def copy(slot, place, rank):
    return pltpu.make_async_copy(
      staged_ref.at[slot, pl.ds(place, 1), :],
      sums_ref.at[pl.ds(rank, 1), :],
      semaphores.at[slot],
    )

  def finish(slot, first_rank, num_rows):
    @pl.loop(0, num_rows)
    def _(place):
      copy(slot, place, first_rank + place).start()

  def reuse(slot, num_rows):
    @pl.loop(0, num_rows)
    def _(place):
      copy(slot, place, 0).wait()

  visit_groups(
    scalars, grads_ref, scratch, block, lambda *_: None, finish, reuse
  )


NUM_SCRATCH = 5
_STAGED = 3


def sums_of(scratch, slot) -> Float[Array, "8 dim"]:
  """The sums of a group that `finish` is called for."""
  return scratch[_STAGED][slot]


def scratch_shapes(dim: int) -> list:
  """Of `visit_groups`: counters, carry, gradients, sums, semaphores."""
  return [
    pltpu.SMEM((2,), jnp.int32),
    pltpu.VMEM((1, dim), jnp.float32),
    pltpu.VMEM((_IN_FLIGHT, dim), jnp.float32),
    pltpu.VMEM((SLOTS, GROUP, dim), jnp.float32),
    pltpu.SemaphoreType.DMA((_IN_FLIGHT,)),
  ]


def visit_groups(
  scalars,
  grads_ref,
  scratch,
  block: int,
  begin: Callable[..., None],
  finish: Callable[..., None],
  reuse: Callable[..., None],
) -> None:
  """Sums the reads of a block; a group of eight sums is handed on when full.

  Args:
    scalars: The block's references of `SortedReads.scalars`.
    grads_ref: Gradients of the outputs, in HBM.
    scratch: References of `scratch_shapes`; see `sums_of`.
    block: Reads of the block.
    begin: Called as `begin(slot, rank, id)`, early: the sum of this row will
      come at place `rank % 8` of the slot, which is free.
    finish: Called as `finish(slot, first_rank, num_rows)` for a group's sums,
      the last group with fewer than eight.
    reuse: Called as `reuse(slot, num_rows)` before a slot is used again, and
      at the end for all: waits for what `finish` has started.
  """
  marks_ref, outputs_ref, ids_ref, *weights_ref = scalars
  counts_ref, carry_ref, rows_ref, staged_ref, semaphores = scratch
  step, num_steps = pl.program_id(0), pl.num_programs(0)

  def slot_of(rank):
    return jax.lax.rem(jax.lax.div(rank, GROUP), SLOTS)

  def place_of(rank):
    return jax.lax.rem(rank, GROUP)

  def copy(j):
    place = jax.lax.rem(j, _IN_FLIGHT)
    return pltpu.make_async_copy(
      grads_ref.at[pl.ds(outputs_ref[0, j], 1), :],
      rows_ref.at[pl.ds(place, 1), :],
      semaphores.at[place],
    )

  def start(j, num_begun):
    mark = marks_ref[0, j]
    is_first = (mark >= 0) & ((mark & 1) != 0)

    @pl.when(mark >= 0)
    def _():
      copy(j).start()

    @pl.when(is_first)
    def _():
      slot, place = slot_of(num_begun), place_of(num_begun)

      @pl.when((place == 0) & (num_begun >= SLOTS * GROUP))
      def _():
        reuse(slot, GROUP)

      begin(slot, num_begun, ids_ref[0, j])

    return num_begun + is_first.astype(jnp.int32)

  def add(j, carry):
    total, num_begun, num_summed = carry
    mark = marks_ref[0, j]
    is_last = (mark >= 0) & ((mark & 2) != 0)

    @pl.when(mark >= 0)
    def _():
      copy(j).wait()

    row = rows_ref[pl.ds(jax.lax.rem(j, _IN_FLIGHT), 1), :]
    for ref in weights_ref:
      row = ref[0, j] * row
    total = jnp.where((mark & 1) != 0, row, total + row)

    @pl.when(is_last)
    def _():
      slot, place = slot_of(num_summed), place_of(num_summed)
      staged_ref[slot, pl.ds(place, 1), :] = total

      @pl.when(place == GROUP - 1)
      def _():
        finish(slot, num_summed - place, GROUP)

    num_begun = jax.lax.cond(
      j + _IN_FLIGHT < block,
      lambda: start(j + _IN_FLIGHT, num_begun),
      lambda: num_begun,
    )
    return total, num_begun, num_summed + is_last.astype(jnp.int32)

  @pl.when(step == 0)
  def _():
    counts_ref[0] = 0
    counts_ref[1] = 0

  num_begun = jax.lax.fori_loop(0, min(_IN_FLIGHT, block), start, counts_ref[0])
  # A row's reads may go on in the next block: their sum is carried over.
  carry_ref[...], num_begun, num_summed = jax.lax.fori_loop(
    0, block, add, (carry_ref[...], num_begun, counts_ref[1])
  )
  counts_ref[0] = num_begun
  counts_ref[1] = num_summed

  @pl.when(step == num_steps - 1)
  def _():
    rest = place_of(num_summed)

    @pl.when(rest > 0)
    def _():
      finish(slot_of(num_summed), num_summed - rest, rest)

    num_groups = jax.lax.div(num_summed + GROUP - 1, GROUP)

    @pl.loop(jnp.maximum(0, num_groups - SLOTS), num_groups)
    def _(group):
      num_rows = jnp.minimum(GROUP, num_summed - group * GROUP)
      reuse(jax.lax.rem(group, SLOTS), num_rows)
