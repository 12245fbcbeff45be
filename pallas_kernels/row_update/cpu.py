"""`row_update` by the C++ kernel of `cpu.cc`, in place if donated."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.native import build
from pallas_kernels.native.call import result_type
from pallas_kernels.row_update import optimizers


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
  if ids.size >= 2**32:
    raise NotImplementedError(
      "row_update: the C++ kernel numbers the reads by 32 bits, got "
      f"{ids.size} reads"
    )
  if weights is None:
    weights = jnp.zeros((0,), jnp.float32)
  inputs = (ids, grads, weights, learning_rate, step)
  updated = (table, *state.values())
  call = jax.ffi.ffi_call(
    build.target("row_update"),
    [result_type(x.shape, x.dtype, *inputs, *updated) for x in updated],
    input_output_aliases={len(inputs) + i: i for i in range(len(updated))},
    # Tables of their own: nothing that one call could share.
    vmap_method="sequential",
  )
  clip_norm = np.inf if rule.clip_norm is None else rule.clip_norm
  table, *arrays = call(
    *inputs,
    *updated,
    optimizer=rule.optimizer,
    num_rows=np.int64(num_rows),
    eps=np.float32(rule.eps),
    b1=np.float64(rule.b1),
    b2=np.float64(rule.b2),
    weight_decay=np.float32(rule.weight_decay),
    clip_norm=np.float32(clip_norm),
  )
  return table, dict(zip(state, arrays, strict=True))
