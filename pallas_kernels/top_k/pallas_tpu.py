"""`top_k` on a TPU, by Mosaic: a sorting network over rows in lanes.

A block of 1,024 rows is turned so that its rows lie side by side, and goes
through `tpu.networks`. Every entry is read once; long rows come in parts.

What this cannot show without a TPU: the time of turning and comparing.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.tpu import networks
from pallas_kernels.tpu.networks import LANES, ROWS, SUBLANES, Entry

# Columns of one step of the grid.
_COLUMNS = 512


def top_k(
  x: Float[Array, "*rows n"], *, k: int, is_sorted: bool = True
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
  """See `api.top_k`; always sorted."""
  del is_sorted
  kept = networks.num_kept(k)
  if not x.size or not k or jnp.finfo(x.dtype).bits > 32:
    raise NotImplementedError(
      "pallas_tpu takes floats of at most 32 bits, not empty, and k of at "
      f"least 1; got {x.dtype}{list(x.shape)} and k = {k}"
    )
  num_rows, n = math.prod(x.shape[:-1]), x.shape[-1]
  width = min(_COLUMNS, LANES * pl.cdiv(n, LANES))
  out_spec = pl.BlockSpec((k, ROWS), lambda r, c: (0, r))
  keys, indices = pl.pallas_call(
    functools.partial(_kernel, n=n, k=k),
    grid=(pl.cdiv(num_rows, ROWS), pl.cdiv(n, width)),
    in_specs=[pl.BlockSpec((ROWS, width), lambda r, c: (r, c))],
    out_specs=[out_spec, out_spec],
    out_shape=[jax.ShapeDtypeStruct((k, num_rows), jnp.int32)] * 2,
    scratch_shapes=[
      pltpu.VMEM((width, SUBLANES, LANES), jnp.int32),
      *networks.scratch_shapes(kept),
      *networks.scratch_shapes(kept),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=64 * 2**20,
    ),
    cost_estimate=pl.CostEstimate(
      flops=0,
      bytes_accessed=x.size * x.dtype.itemsize + 8 * num_rows * k,
      transcendentals=0,
    ),
    interpret=dispatch.interpret_mode(),
    name="top_k",
  )(x.reshape(num_rows, n))
  # Rows were the faster axis in the kernel, and may stay so: XLA decides.
  values = networks.to_float(keys.T).astype(x.dtype)
  shape = (*x.shape[:-1], k)
  return values.reshape(shape), indices.T.reshape(shape)


def _kernel(x_ref, keys_ref, indices_ref, turned_ref, *refs, n, k):
  column = pl.program_id(1)
  best, fresh = refs[:2], refs[2:]
  width, kept = turned_ref.shape[0], best[0].shape[0]
  turn(x_ref, turned_ref)

  @pl.when(column == 0)
  def _():
    networks.clear(best)

  def read(place):
    index = column * width + place
    key = jnp.where(index < n, turned_ref[place], jnp.iinfo(jnp.int32).min)
    index = jnp.where(index < n, index, jnp.iinfo(jnp.int32).max)
    return Entry(key, jnp.full_like(key, index))

  networks.keep_best(best, fresh, read, width // kept, is_stable=True)

  @pl.when(column == pl.num_programs(1) - 1)
  def _():
    for ref, found in zip((keys_ref, indices_ref), best, strict=True):
      for i in range(SUBLANES):
        ref[:, pl.ds(i * LANES, LANES)] = found[:k, i, :]


def turn(x_ref, turned_ref) -> None:
  """Scores [1024, n] as integer images [n, 8, 128], rows in the lanes."""
  for i in range(SUBLANES):

    @pl.loop(0, x_ref.shape[1] // LANES)
    def _(j, i=i):
      part = pl.ds(pl.multiple_of(j * LANES, LANES), LANES)
      block = x_ref[pl.ds(i * LANES, LANES), part].astype(jnp.float32)
      turned_ref[part, i, :] = networks.to_key(block.T)
