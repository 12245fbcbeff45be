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

import gc

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """A file's tests share what they compile, so one process runs them all.

  Those of the contract share it by model: the last words of their names.
  """
  for item in items:
    item.add_marker(pytest.mark.xdist_group(group_of(item)))


def group_of(item) -> str:
  """The tests that run in one process, one after the other."""
  group = item.path.stem
  if group == "model_contract_test":
    cases = item.module.ALL
    group = max(
      (c["name"] for c in cases if item.name.endswith(c["testcase_name"])),
      key=len,
      default=group,
    )
  return group


def pytest_runtest_teardown(item, nextitem):
  """Programs of a group go with it.

  Each holds pieces of mapped memory, of which a process may have some 65,000.
  """
  if nextitem is None or group_of(nextitem) != group_of(item):
    jax.clear_caches()
    gc.collect()
