"""`jax.jit` for tests: compiles fast rather than well, for each runs once."""

import jax

OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


def jit(fn, **kwargs):
  """`jax.jit(fn, **kwargs)` without the compiler's costly passes."""
  return jax.jit(fn, compiler_options=OPTIONS, **kwargs)
