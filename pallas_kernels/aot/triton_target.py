"""Triton kernels compiled for a GPU that is not there, for tests.

jax-triton asks the GPU of the process for its compute capability, and keeps
what Triton made of a kernel to itself. Within `triton_target` it is told a
capability, and what it compiles is kept:

    with triton_target(90) as kernels:
      jax.jit(fn).trace(x).lower(lowering_platforms=("cuda",))
    assert resources(kernels[0]).spill_bytes == 0

It patches names that are not public: so it is no part of the operators.
"""

import contextlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax

from pallas_kernels.gpu import triton


class Kernel(NamedTuple):
  """What Triton compiled for one call."""

  name: str
  num_warps: int
  shared_bytes: int
  ptx: str


class Resources(NamedTuple):
  """What the assembler says of a kernel; registers are a thread's."""

  registers: int
  spill_bytes: int
  stack_bytes: int


@contextlib.contextmanager
def triton_target(compute_capability: int) -> Iterator[list[Kernel]]:
  """jax-triton compiles for this compute capability, 80 or 90, in this block.

  Yields:
    The kernels that it compiles, in this order; empty at first.
  """
  # A missing wheel is told of with what to install.
  triton.require("triton_target")
  from jax_triton import triton_lib

  kernels = []
  library = triton_lib.triton_kernel_call_lib
  make = library.TritonKernel

  def keep(name, num_warps, num_ctas, shared_bytes, ptx, *rest):
    kernels.append(Kernel(name, num_warps, shared_bytes, ptx))
    return make(name, num_warps, num_ctas, shared_bytes, ptx, *rest)

  with contextlib.ExitStack() as stack:
    patch = lambda *names: stack.enter_context(mock.patch.object(*names))  # noqa: E731
    patch(library, "get_compute_capability", lambda device: compute_capability)
    patch(library, "TritonKernel", keep)
    # Else what was compiled for another capability would be taken.
    jax.clear_caches()
    patch(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    yield kernels


def resources(kernel: Kernel) -> Resources:
  """Assembles a kernel's PTX by the assembler that comes with Triton."""
  from triton import knobs

  arch = re.search(r"^\.target\s+(\w+)", kernel.ptx, re.MULTILINE)[1]
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, "kernel.ptx")
    source.write_text(kernel.ptx)
    command = [knobs.nvidia.ptxas.path, f"-arch={arch}", "-v", str(source)]
    command += ["-o", str(source.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  number = lambda words: int(re.search(rf"(\d+) {words}", done.stderr)[1])  # noqa: E731
  return Resources(
    registers=number("registers"),
    spill_bytes=number("bytes spill stores") + number("bytes spill loads"),
    stack_bytes=number("bytes stack frame"),
  )
