"""Calls of Triton kernels from JAX, through jax-triton.

It is fragile: 0.3.1 works with jax 0.10.2, and of what is newer 0.4.1 fails
with jax 0.12. So it is imported at the first call, and any other pair than the
one that these kernels have been compiled with is refused with the reason.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PAIR = {"jax": "0.10.2", "jax-triton": "0.3.1"}


def require(operator: str) -> types.ModuleType:
  """The module `jax_triton`.

  Raises:
    NotImplementedError: If it is not there or of another version.
  """
  wanted = " with ".join(f"{name} {v}" for name, v in reversed(PAIR.items()))
  try:
    import jax_triton
    from triton import knobs
  except (ImportError, AttributeError) as error:
    # Without the CUDA plugin its import fails, in several ways.
    raise NotImplementedError(
      f"{operator}: jax_triton needs {wanted} and the CUDA plugin of jax, and "
      f"its import fails: {str(error).splitlines()[0]}"
    ) from error
  found = {"jax": jax.__version__, "jax-triton": jax_triton.__version__}
  if found != PAIR:
    here = " with ".join(f"{name} {v}" for name, v in reversed(found.items()))
    raise NotImplementedError(
      f"{operator}: jax_triton needs {wanted}, and here is {here}"
    )
  # For compute capability 9.0 and above Triton writes PTX of the newest CUDA,
  # 13.4 here, which older drivers and assemblers, as of CUDA 13.0, refuse. That
  # of its other assembler, CUDA 12.9, is read by all that jax takes.
  knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
  return jax_triton


def call(
  operator: str,
  kernel: Any,
  arrays: Sequence[jax.Array],
  scalars: Sequence[int],
  results: Sequence[tuple[Sequence[int], Any]],
  *,
  grid: Sequence[int],
  num_warps: int,
  **constants: Any,
) -> list[jax.Array]:
  """Runs a kernel of arrays, then scalars, then results.

  Args:
    operator: Its name, in messages and profiles.
    kernel: What `triton.jit` made.
    arrays: Of 16 aligned bytes, as those of XLA are.
    scalars: Sizes that do not make a kernel of its own.
    results: Shape and type of each.
    grid: Programs of each axis.
    num_warps: A program.
    **constants: The kernel's `constexpr`.
  """
  if 0 in grid:
    outputs = [jnp.zeros(*result) for result in results]
  else:
    outputs = require(operator).triton_call(
      *arrays,
      *scalars,
      kernel=kernel,
      name=f"pallas_kernels.{operator}",
      out_shape=[jax.ShapeDtypeStruct(*result) for result in results],
      grid=tuple(grid),
      num_warps=num_warps,
      # One buffer: there are no loops of matrix products to overlap.
      num_stages=1,
      **constants,
    )
  # It does not know of `shard_map`, where results differ as the inputs do.
  varying = frozenset().union(
    *(jax.typeof(x).manual_axis_type.varying for x in arrays)
  )
  if varying:
    axes = tuple(sorted(varying))
    outputs = [jax.lax.pcast(x, axes, to="varying") for x in outputs]
  return outputs


def over_rows(fn: Callable[..., Any], num_rowwise: int) -> Callable[..., Any]:
  """`vmap` for what works on each leading index of its first arguments.

  Args:
    fn: Of arrays. The first `num_rowwise` take more leading axes, and the
      results then have them too; where another one is mapped over, the calls
      follow each other.
  """
  mapped = jax.custom_batching.custom_vmap(fn)

  @mapped.def_vmap
  def rule(axis_size, is_mapped, *arrays):
    if any(jax.tree.leaves(is_mapped[num_rowwise:])):
      out = jax.lax.map(
        lambda i: mapped(
          *(
            jax.tree.map(lambda x: x[i], x) if on else x
            for x, on in zip(arrays, is_mapped, strict=True)
          )
        ),
        jnp.arange(axis_size),
      )
    else:
      rowwise = [
        x if on else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, on in zip(arrays[:num_rowwise], is_mapped, strict=False)
      ]
      out = mapped(*rowwise, *arrays[num_rowwise:])
    return out, jax.tree.map(lambda _: True, out)

  return mapped


def power_of_two(n: int) -> int:
  """The least one that is at least `n`, from 1."""
  return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
  """`a / b`, rounded up."""
  return -(-a // b)
