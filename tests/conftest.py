"""Eight simulated devices, and silent broadcasting of ranks is an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Less time in LLVM: the compiled program is the same, its machine code slower.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

# A process of many tests had better give freed memory back; the variable keeps
# the commands that run in it from deciding otherwise.
os.environ.setdefault("GLIBC_TUNABLES", "")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
