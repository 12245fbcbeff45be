"""The search of a memory on a TPU, by Mosaic, in one pass.

For 1,024 queries at a time: LayerNorm, products with the sub-keys, which the
matrix unit hands over with the queries in the lanes, the best of both axes and
of the pairs that can win (`tpu.networks`), softmax. Of the score matrices
nothing goes to HBM, neither here nor in the gradient, which builds the few
gradients of scores again from the slots and feeds them to the matrix unit.

Products are in full float32, which the matrix unit takes six passes for. What
this cannot show without a TPU: how the network's time compares to theirs.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.product_key_topk import reference
from pallas_kernels.product_key_topk.xla import candidate_pairs
from pallas_kernels.top_k import pallas_tpu as top_k_tpu
from pallas_kernels.tpu import networks
from pallas_kernels.tpu.networks import LANES, ROWS, SUBLANES, Entry

_VMEM_BYTES = 64 * 2**20
# Scores of both axes and the keys have to fit into VMEM.
_MAX_KEYS = 2048
# Keys whose gradients of scores are made at once, and rows whose LayerNorm is
# gone back through: more would not stay in registers.
_SPREAD = 64
_ADDED = 8
_NORMALISED = 32
_LOWEST = jnp.iinfo(jnp.int32).min
_PRECISION = jax.lax.Precision.HIGHEST


def product_key_lookup(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows heads top_k"], Int[Array, "*rows heads top_k"]]:
  """See `api.product_key_lookup`."""
  _, num_heads, num_keys, dim = keys.shape
  kept = _check(queries, num_keys, top_k)
  num_rows = math.prod(queries.shape[:-3])
  gains = [] if gain is None else [gain]
  pairs = num_keys * dim * 2 * num_heads
  out_spec = pl.BlockSpec((num_heads, top_k, ROWS), lambda r: (0, 0, r))
  shape = (num_heads, top_k, num_rows)
  weights, slots = pl.pallas_call(
    functools.partial(_lookup_kernel, top_k=top_k, has_gain=bool(gains)),
    grid=(pl.cdiv(num_rows, ROWS),),
    in_specs=[
      pl.BlockSpec((ROWS, 2 * num_heads * dim), lambda r: (r, 0)),
      *(_whole(x) for x in (keys, *gains)),
    ],
    out_specs=[out_spec, out_spec],
    out_shape=[
      jax.ShapeDtypeStruct(shape, jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.int32),
    ],
    scratch_shapes=[
      pltpu.VMEM((LANES, dim), jnp.float32),
      *_search_scratch(num_keys, kept, top_k),
    ],
    compiler_params=_params("parallel"),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_rows * pairs,
      bytes_accessed=4 * (queries.size + keys.size + 2 * math.prod(shape)),
      transcendentals=num_rows * num_heads * top_k,
    ),
    interpret=dispatch.interpret_mode(),
    name="product_key_lookup",
  )(queries.reshape(num_rows, -1), keys, *gains)
  shape = (*queries.shape[:-3], num_heads, top_k)
  return tuple(jnp.moveaxis(x, -1, 0).reshape(shape) for x in (weights, slots))


def product_key_topk(
  row_scores: Float[Array, "*rows keys"],
  col_scores: Float[Array, "*rows keys"],
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows top_k"], Int[Array, "*rows top_k"]]:
  """See `api.product_key_topk`."""
  num_keys = row_scores.shape[-1]
  kept = _check(row_scores, num_keys, top_k)
  num_rows = math.prod(row_scores.shape[:-1])
  in_spec = pl.BlockSpec((ROWS, _up(num_keys, LANES)), lambda r: (r, 0))
  out_spec = pl.BlockSpec((top_k, ROWS), lambda r: (0, r))
  shape = (top_k, num_rows)
  sums, slots = pl.pallas_call(
    functools.partial(_topk_kernel, top_k=top_k, num_keys=num_keys),
    grid=(pl.cdiv(num_rows, ROWS),),
    in_specs=[in_spec, in_spec],
    out_specs=[out_spec, out_spec],
    out_shape=[
      jax.ShapeDtypeStruct(shape, jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.int32),
    ],
    scratch_shapes=_search_scratch(num_keys, kept, top_k),
    compiler_params=_params("parallel"),
    cost_estimate=pl.CostEstimate(
      flops=0,
      bytes_accessed=8 * (row_scores.size + math.prod(shape)),
      transcendentals=0,
    ),
    interpret=dispatch.interpret_mode(),
    name="product_key_topk",
  )(*(x.reshape(num_rows, num_keys) for x in (row_scores, col_scores)))
  shape = (*row_scores.shape[:-1], top_k)
  return sums.T.reshape(shape), slots.T.reshape(shape)


def product_key_topk_grad(
  slots: Int[Array, "*rows top_k"],
  grads: Float[Array, "*rows top_k"],
  *,
  num_keys: int,
) -> list[Float[Array, "*rows keys"]]:
  """See `xla.product_key_topk_grad`.

  A comparison with every key in place of a scatter, which a TPU does one
  number after the other; XLA sums it without writing it down.
  """

  def spread(keys):
    is_key = jax.nn.one_hot(keys, num_keys, dtype=jnp.bool_)
    return jnp.sum(jnp.where(is_key, grads[..., None], 0.0), axis=-2)

  return [spread(slots // num_keys), spread(slots % num_keys)]


def product_key_lookup_grad(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  weights: Float[Array, "*rows heads top_k"],
  slots: Int[Array, "*rows heads top_k"],
  grads: Float[Array, "*rows heads top_k"],
) -> tuple[Array, Array, Array | None]:
  """See `xla.product_key_lookup_grad`."""
  _, num_heads, num_keys, dim = keys.shape
  top_k = slots.shape[-1]
  _check(queries, num_keys, top_k)
  num_rows = math.prod(queries.shape[:-3])
  gains = [] if gain is None else [gain]
  rows_spec = pl.BlockSpec((ROWS, 2 * num_heads * dim), lambda r: (r, 0))
  best_spec = pl.BlockSpec((num_heads, top_k, ROWS), lambda r: (0, 0, r))

  def turned(x):
    return jnp.moveaxis(x.reshape(num_rows, num_heads, top_k), 0, -1)

  query_grads, *sums = pl.pallas_call(
    functools.partial(_grad_kernel, num_rows=num_rows, has_gain=bool(gains)),
    grid=(pl.cdiv(num_rows, ROWS),),
    in_specs=[
      rows_spec,
      *(_whole(x) for x in (keys, *gains)),
      *(best_spec for _ in range(3)),
    ],
    out_specs=[rows_spec, *(_whole(x) for x in (keys, *gains))],
    out_shape=[
      jax.ShapeDtypeStruct((num_rows, 2 * num_heads * dim), jnp.float32),
      *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (keys, *gains)),
    ],
    scratch_shapes=[
      pltpu.VMEM((top_k, LANES), jnp.float32),
      pltpu.VMEM((top_k, LANES), jnp.int32),
      pltpu.VMEM((_up(num_keys, _SPREAD), LANES), jnp.float32),
      pltpu.VMEM((LANES, dim), jnp.float32),
      pltpu.VMEM((LANES, dim), jnp.float32),
    ],
    compiler_params=_params("arbitrary"),
    cost_estimate=pl.CostEstimate(
      flops=4 * num_rows * keys.size,
      bytes_accessed=4 * (2 * queries.size + 2 * keys.size + 3 * slots.size),
      transcendentals=0,
    ),
    interpret=dispatch.interpret_mode(),
    name="product_key_lookup_grad",
  )(
    queries.reshape(num_rows, -1),
    keys,
    *gains,
    *(turned(x) for x in (weights, slots, grads)),
  )
  key_grads, *gain_grads = sums
  return (
    query_grads.reshape(queries.shape),
    key_grads,
    gain_grads[0] if gain_grads else None,
  )


def _check(x: Array, num_keys: int, top_k: int) -> int:
  """What a network keeps for `top_k`, if this can be done."""
  if not x.size or num_keys > _MAX_KEYS:
    raise NotImplementedError(
      f"pallas_tpu takes up to {_MAX_KEYS} keys an axis and at least one row, "
      f"got {num_keys} keys and an array of shape {x.shape}"
    )
  return networks.num_kept(top_k)


def _params(semantics: str) -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
    dimension_semantics=(semantics,), vmem_limit_bytes=_VMEM_BYTES
  )


def _whole(x: Array) -> pl.BlockSpec:
  """The same block, all of `x`, at every step."""
  return pl.BlockSpec(x.shape, lambda r: (0,) * x.ndim)


def _search_scratch(num_keys: int, kept: int, top_k: int) -> list:
  """Of `_search`: scores of an axis, pairs, the best of axes and pairs."""
  num_pairs = _up(len(candidate_pairs(top_k, num_keys)[0]), kept)
  pairs = (num_pairs, SUBLANES, LANES)
  return [
    pltpu.VMEM((_up(num_keys, max(kept, LANES)), SUBLANES, LANES), jnp.int32),
    pltpu.VMEM(pairs, jnp.int32),
    pltpu.VMEM(pairs, jnp.int32),
    *(x for _ in range(4) for x in networks.scratch_shapes(kept)),
  ]


def _up(n: int, multiple: int) -> int:
  return multiple * pl.cdiv(n, multiple)


def _lookup_kernel(queries_ref, keys_ref, *refs, top_k, has_gain):
  gain_ref, *refs = refs if has_gain else (None, *refs)
  weights_ref, slots_ref, normal_ref, *scratch = refs
  _, num_heads, num_keys, dim = keys_ref.shape
  scores_ref = scratch[0]
  for head in range(num_heads):

    def fill(axis, head=head):
      part = pl.ds((axis * num_heads + head) * dim, dim)

      @pl.loop(0, SUBLANES)
      def _(i):
        queries = queries_ref[_part(i), part]
        if has_gain:
          gain = gain_ref[pl.ds(axis, 1), :]
          queries = reference.normalise(queries) * gain
        normal_ref[...] = queries

        def score(some):
          scores = _dot(keys_ref[axis, head, some], normal_ref[...], (1, 1))
          scores_ref[some, i, :] = networks.to_key(scores)

        _over_keys(num_keys, score)

    sums, slots = _search(fill, num_keys, top_k, scratch)
    # The first is the largest.
    shifted = [jnp.exp(s - sums[0]) for s in sums]
    total = functools.reduce(jnp.add, shifted)
    for j in range(top_k):
      _put(weights_ref, (head, j), shifted[j] / total)
      _put(slots_ref, (head, j), slots[j])


def _topk_kernel(
  row_ref, col_ref, sums_ref, slots_ref, *scratch, top_k, num_keys
):
  def fill(axis):
    top_k_tpu.turn((row_ref, col_ref)[axis], scratch[0])

  sums, slots = _search(fill, num_keys, top_k, scratch)
  for j in range(top_k):
    _put(sums_ref, (j,), sums[j])
    _put(slots_ref, (j,), slots[j])


def _search(fill, num_keys: int, top_k: int, scratch: list):
  """Sums and slots of the best pairs, each a list of [8, 128] by rank.

  Args:
    fill: Puts the scores of an axis into `scratch[0]`.
    num_keys: Of an axis.
    top_k: How many.
    scratch: References of `_search_scratch`.
  """
  scores_ref, pair_keys_ref, pair_slots_ref, *best = scratch
  row_best, col_best, pair_best, fresh = (
    best[i : i + 2] for i in range(0, 8, 2)
  )
  kept = row_best[0].shape[0]

  def read(place):
    key = jnp.where(place < num_keys, _above(scores_ref[place]), _LOWEST)
    return Entry(key, jnp.full_like(key, place))

  for axis, found in enumerate((row_best, col_best)):
    fill(axis)
    networks.clear(found)
    num_blocks = pl.cdiv(num_keys, kept)
    networks.keep_best(found, fresh, read, num_blocks, is_stable=False)

  pairs = list(zip(*candidate_pairs(top_k, num_keys), strict=True))
  for place in range(pair_keys_ref.shape[0]):
    if place < len(pairs):
      i, j = (int(n) for n in pairs[place])
      total = networks.to_float(row_best[0][i]) + networks.to_float(
        col_best[0][j]
      )
      pair_keys_ref[place] = _above(networks.to_key(total))
      pair_slots_ref[place] = row_best[1][i] * num_keys + col_best[1][j]
    else:
      pair_keys_ref[place] = jnp.full((SUBLANES, LANES), _LOWEST, jnp.int32)
      pair_slots_ref[place] = jnp.full((SUBLANES, LANES), -1, jnp.int32)
  networks.clear(pair_best)
  networks.keep_best(
    pair_best,
    fresh,
    lambda place: Entry(pair_keys_ref[place], pair_slots_ref[place]),
    pair_keys_ref.shape[0] // kept,
    is_stable=False,
  )
  keys_ref, slots_ref = pair_best
  sums = [networks.to_float(keys_ref[j]) for j in range(top_k)]
  return sums, [slots_ref[j] for j in range(top_k)]


def _above(keys: Int[Array, "8 128"]) -> Int[Array, "8 128"]:
  """Above what fills up, which the least NaN would be equal to."""
  return jnp.maximum(keys, _LOWEST + 1)


def _put(ref, place: tuple, x: Array) -> None:
  """[8, 128] as 1,024 lanes of a row."""
  for i in range(SUBLANES):
    ref[(*place, pl.ds(i * LANES, LANES))] = x[i]


def _grad_kernel(queries_ref, keys_ref, *refs, num_rows, has_gain):
  gain_ref, *refs = refs if has_gain else (None, *refs)
  weights_ref, slots_ref, grads_ref, *refs = refs
  query_grads_ref, key_grads_ref, *gain_grads_ref = refs[: 2 + has_gain]
  sums_ref, places_ref, spread_ref, normal_ref, scaled_ref = refs[
    2 + has_gain :
  ]
  _, num_heads, num_keys, dim = keys_ref.shape
  first = pl.program_id(0) * ROWS

  @pl.when(first == 0)
  def _():
    for ref in (key_grads_ref, *gain_grads_ref):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  for head, axis in itertools.product(range(num_heads), range(2)):
    part = pl.ds((axis * num_heads + head) * dim, dim)

    @pl.loop(0, SUBLANES)
    def _(i, head=head, axis=axis, part=part):
      weights = weights_ref[head, :, _part(i)]
      grads = grads_ref[head, :, _part(i)]
      inner = jnp.sum(weights * grads, axis=0, keepdims=True)
      sums_ref[...] = weights * (grads - inner)

      @pl.when(first + ROWS > num_rows)
      def _():
        lanes = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        is_row = lanes < num_rows - first - i * LANES
        sums_ref[...] = jnp.where(is_row, sums_ref[...], 0.0)

      slots = slots_ref[head, :, _part(i)]
      row_keys = jax.lax.div(slots, num_keys)
      places_ref[...] = slots - row_keys * num_keys if axis else row_keys
      _spread(sums_ref, places_ref, spread_ref)

      def rows_of(j):
        """Queries of a part of the block, and where they stand."""
        start = pl.multiple_of(i * LANES + j * _NORMALISED, _NORMALISED)
        rows = jax.lax.broadcasted_iota(jnp.int32, (_NORMALISED, 1), 0)
        own = pl.ds(start, _NORMALISED)
        # Behind the last row is whatever was in memory.
        is_row = rows < num_rows - first - start
        return jnp.where(is_row, queries_ref[own, part], 0.0), own

      @pl.loop(0, LANES // _NORMALISED)
      def _(j):
        queries, _ = rows_of(j)
        if has_gain:
          gain = gain_ref[pl.ds(axis, 1), :]
          queries = reference.normalise(queries) * gain
        normal_ref[_part(j, _NORMALISED)] = queries

      scaled_ref[...] = jnp.zeros(scaled_ref.shape, jnp.float32)

      # One product at a time: operands are cut into three parts of bfloat16,
      # and those of two would not stay in registers.
      def to_queries(some):
        grads = _dot(spread_ref[some], keys_ref[axis, head, some], (0, 0))
        scaled_ref[...] += grads

      def to_keys(some):
        grads = _dot(spread_ref[some], normal_ref[...], (1, 0))
        key_grads_ref[axis, head, some] += grads

      _over_keys(num_keys, to_queries)
      _over_keys(num_keys, to_keys)

      @pl.loop(0, LANES // _NORMALISED)
      def _(j):
        queries, own = rows_of(j)
        grads = scaled_ref[_part(j, _NORMALISED)]
        if has_gain:
          gain = gain_ref[pl.ds(axis, 1), :]
          normal, vjp = jax.vjp(reference.normalise, queries)
          gain_grads_ref[0][pl.ds(axis, 1), :] += jnp.sum(
            grads * normal, 0, keepdims=True
          )
          (grads,) = vjp(grads * gain)
        query_grads_ref[own, part] = grads


def _spread(sums_ref, places_ref, spread_ref) -> None:
  """Gradients [top_k, 128] at their places among the keys [keys, 128]."""

  @pl.loop(0, spread_ref.shape[0] // _SPREAD)
  def _(block):
    shape = (SUBLANES, LANES)
    iota = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    starts = [block * _SPREAD + i for i in range(0, _SPREAD, SUBLANES)]
    keys = [iota + start for start in starts]

    def add(j, totals):
      place, total = places_ref[pl.ds(j, 1), :], sums_ref[pl.ds(j, 1), :]
      return [
        x + jnp.where(place == key, total, 0.0)
        for x, key in zip(totals, keys, strict=True)
      ]

    top_k = sums_ref.shape[0]
    zeros = [jnp.zeros(shape, jnp.float32) for _ in keys]
    # Of all at once a compiler would read all before it adds any.
    unroll = math.gcd(top_k, _ADDED)
    totals = jax.lax.fori_loop(0, top_k, add, zeros, unroll=unroll)
    for start, total in zip(starts, totals, strict=True):
      spread_ref[pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES)] = total


def _part(i, size: int = LANES) -> pl.Slice:
  """The i-th part of this size."""
  return pl.ds(pl.multiple_of(i * size, size), size)


def _over_keys(num_keys: int, body) -> None:
  """Calls `body(some)` for parts of the keys that registers have room for."""
  num_blocks, rest = divmod(num_keys, LANES)
  if num_blocks:
    pl.loop(0, num_blocks)(lambda i: body(_part(i)))
  if rest:
    body(pl.ds(num_blocks * LANES, rest))


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
  """Sum of products along an axis of each."""
  return jax.lax.dot_general(
    a,
    b,
    ((axes[:1], axes[1:]), ((), ())),
    precision=_PRECISION,
    preferred_element_type=jnp.float32,
  )
