"""`row_update` on a TPU, by Mosaic, in one pass.

Reads are sorted by id and summed (`tpu.segments`), so that no two rows in
flight are the same and nothing has to be atomic. The rows come in by copies
that start as early as those of their gradients; eight at a time they are
updated by the very rule of `optimizers` and copied back. Neither the sums nor
the gradients of the reads ever lie in HBM, and the table stays where it is.

Tables are float32 with rows of a multiple of 128 numbers; see `sparse_gather`.
What this cannot show without a TPU: the time of the sort and of the copies.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.row_update import optimizers
from pallas_kernels.tpu import layout, segments
from pallas_kernels.tpu.segments import GROUP, LANES, SLOTS


def row_update(
  table: Array,
  state: dict[str, Array],
  ids: Int[Array, "*reads"],
  grads: Float[Array, "*outputs dim"],
  weights: Float[Array, "*reads"] | None,
  learning_rate: Float[Array, ""],
  step: Int[Array, ""],
  *,
  rule: optimizers.Rule,
  num_rows: int,
) -> tuple[Array, dict[str, Array]]:
  """See `api.row_update`."""
  dim = segments.check_dim(table)
  reads = segments.sort_reads(ids, weights, num_rows=num_rows)
  # Past the table, which may have more than `num_rows` rows.
  unique = jnp.where(reads.unique < num_rows, reads.unique, table.shape[0])
  size = unique.size
  num_groups = pl.cdiv(size, GROUP)
  is_small = {name: x.ndim == 1 for name, x in state.items()}

  def read(x):
    """A line of 128 numbers for each group, the least that can be copied."""
    x = x.at[unique].get(mode="fill", fill_value=0, indices_are_sorted=True)
    x = jnp.pad(x, (0, num_groups * GROUP - size)).reshape(num_groups, GROUP)
    return jnp.pad(x, ((0, 0), (0, LANES - GROUP)))

  def write(x, lines):
    new = lines[:, :GROUP].reshape(-1)[:size]
    return x.at[unique].set(new, mode="drop", indices_are_sorted=True)

  in_place = [table] + [
    read(x) if is_small[name] else x for name, x in state.items()
  ]
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  inputs = [step[None], learning_rate[None], *reads.scalars]
  inputs.append(grads.reshape(-1, dim))
  table, *rest = pl.pallas_call(
    functools.partial(
      _kernel,
      rule=rule,
      is_small=is_small,
      block=reads.block,
      num_scalars=len(reads.scalars),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(reads.num_blocks,),
      in_specs=[*reads.specs(), anywhere, *(anywhere for _ in in_place)],
      out_specs=[anywhere for _ in in_place],
      scratch_shapes=[
        *segments.scratch_shapes(dim),
        pltpu.VMEM((SLOTS, GROUP, dim), jnp.float32),
        *(
          pltpu.VMEM(
            (SLOTS, *((1, LANES) if small else (GROUP, dim))), jnp.float32
          )
          for small in is_small.values()
        ),
        pltpu.SMEM((SLOTS, GROUP), jnp.int32),
        pltpu.SemaphoreType.DMA((2, SLOTS)),
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in in_place],
    input_output_aliases={len(inputs) + i: i for i in range(len(in_place))},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    cost_estimate=pl.CostEstimate(
      flops=2 * ids.size * dim + 8 * size * dim * len(in_place),
      # At most; repeated ids are fewer rows.
      bytes_accessed=segments.read_bytes(reads, dim)
      + 8 * size * dim * (1 + sum(not x for x in is_small.values()))
      + 8 * num_groups * LANES * sum(is_small.values()),
      transcendentals=size,
    ),
    interpret=dispatch.interpret_mode(),
    name="row_update",
  )(*inputs, *in_place)
  return table, {
    name: write(x, new) if is_small[name] else new
    for (name, x), new in zip(state.items(), rest, strict=True)
  }


def _kernel(step_ref, rate_ref, *refs, rule, is_small, block, num_scalars):
  by_row = [True, *(not small for small in is_small.values())]
  num_arrays = len(by_row)
  scalars, (grads_ref, *refs) = refs[:num_scalars], refs[num_scalars:]
  # The outputs, which are the same memory as the inputs before them.
  arrays, refs = refs[num_arrays : 2 * num_arrays], refs[2 * num_arrays :]
  scratch, refs = refs[: segments.NUM_SCRATCH], refs[segments.NUM_SCRATCH :]
  buffers, (ids_ref, semaphores) = refs[:num_arrays], refs[num_arrays:]

  def move(slot, place, index, is_write, *, by_rows):
    """The copies between HBM and a place of the slot, not yet started."""
    for array, buffer, yes in zip(arrays, buffers, by_row, strict=True):
      if yes is not by_rows:
        continue
      ours = buffer.at[slot, pl.ds(place, 1), :]
      theirs = array.at[pl.ds(index, 1), :]
      source, target = (ours, theirs) if is_write else (theirs, ours)
      yield pltpu.make_async_copy(
        source, target, semaphores.at[int(is_write), slot]
      )

  def wait(slot, num_rows, is_write):
    @pl.loop(0, num_rows)
    def _(place):
      for copy in move(slot, place, 0, is_write, by_rows=True):
        copy.wait()

    for copy in move(slot, 0, 0, is_write, by_rows=False):
      copy.wait()

  def begin(slot, rank, index):
    place = jax.lax.rem(rank, GROUP)
    ids_ref[slot, place] = index
    for copy in move(slot, place, index, False, by_rows=True):
      copy.start()

    @pl.when(place == 0)
    def _():
      group = jax.lax.div(rank, GROUP)
      for copy in move(slot, 0, group, False, by_rows=False):
        copy.start()

  def finish(slot, first_rank, num_rows):
    wait(slot, num_rows, False)
    state = {}
    for name, buffer in zip(is_small, buffers[1:], strict=True):
      state[name] = buffer[slot]
      if is_small[name]:
        state[name] = layout.to_column(buffer[slot, :, :GROUP])[:, 0]
    buffers[0][slot], state = rule.apply(
      buffers[0][slot],
      state,
      segments.sums_of(scratch, slot),
      rate_ref[0],
      step_ref[0],
    )
    for name, buffer in zip(is_small, buffers[1:], strict=True):
      if is_small[name]:
        buffer[slot, :, :GROUP] = layout.to_row(state[name][:, None])
      else:
        buffer[slot] = state[name]

    @pl.loop(0, num_rows)
    def _(place):
      index = ids_ref[slot, place]
      for copy in move(slot, place, index, True, by_rows=True):
        copy.start()

    group = jax.lax.div(first_rank, GROUP)
    for copy in move(slot, 0, group, True, by_rows=False):
      copy.start()

  segments.visit_groups(
    scalars,
    grads_ref,
    scratch,
    block,
    begin,
    finish,
    lambda slot, num_rows: wait(slot, num_rows, True),
  )
