"""The CUDA compiler of XLA, on a machine without a GPU.

It says what a device is not needed for: memory, copies, registers, spills. It
does not time anything. XLA tunes no matrix product and picks a slower sort
than with a device.
"""

import atexit
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
_TARGETS = {
  "a100": {
    "name": "NVIDIA A100-SXM4-80GB",
    "major": 8,
    "cores": 108,
    "fpus": 64,
    "clock": 1.41,
    "bandwidth": 2_039_000_000_000,
    "l2": 41_943_040,
    "memory": 85_899_345_920,
    "shared_per_core": 167_936,
    "shared_per_block": 166_912,
  },
  "h100": {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "cores": 132,
    "fpus": 128,
    "clock": 1.98,
    "bandwidth": 3_352_320_000_000,
    "l2": 52_428_800,
    "memory": 84_929_347_584,
    "shared_per_core": 233_472,
    "shared_per_block": 232_448,
  },
}
# Stands for ptxas and keeps what it reports.
_WRAPPER = """#!/bin/sh
"{ptxas}" -v "$@" 2> "{folder}/$$.report"
status=$?
grep -v "^ptxas info" "{folder}/$$.report" >&2
exit $status
"""
_INSTALL = "install it with: pip install 'recjax[aot]'"


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What `ptxas -v` says of one function on the device.

  Attributes:
    name: That of the `pallas_call`, or XLA's.
    registers: Of each thread; 255 at most.
    spill_stores: Bytes a thread writes for want of registers.
    spill_loads: Bytes it reads back.
    shared_bytes: Shared memory of a block, as far as it is known before the
      start.
  """

  name: str
  registers: int
  spill_stores: int
  spill_loads: int
  shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program for a GPU.

  Attributes:
    argument_bytes: Of all arguments.
    output_bytes: Of all results.
    alias_bytes: Of the results that lie where a donated argument lay.
    temp_bytes: Of all else that is held while it runs.
    hlo: The optimised program, as text.
    kernels: Its functions on the device; none if the program came out of
      jax's compilation cache.
  """

  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  hlo: str
  kernels: tuple[Kernel, ...]


def compile_for(
  target: str,
  fn: Callable[..., Any],
  *args: Any,
  donate_argnums: int | Sequence[int] = (),
) -> Compiled:
  """Compiles a function for a GPU that need not be there.

  Args:
    target: `a100` or `h100`.
    fn: Function of arrays; jitted here. Kernels of this package need
      `dispatch.use(name, platform="gpu")` around the call.
    *args: Arrays or `jax.ShapeDtypeStruct`s, or trees of them.
    donate_argnums: As `jax.jit` takes them.

  Raises:
    ValueError: For an unknown target.
    RuntimeError: If the CUDA plugin or `ptxas` is missing, with what to
      install.

  Example:
    >>> x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    >>> compile_for("h100", lambda x: x + 1, x).temp_bytes
    0
  """
  if target not in _TARGETS:
    raise ValueError(
      f"compile_for: unknown target {target!r}; there are "
      + ", ".join(_TARGETS)
    )
  mesh = _mesh(target)
  sharding = NamedSharding(mesh, P())
  jitted = jax.jit(
    lambda *args: fn(*args),  # Of its own, lest jax knows it from before.
    donate_argnums=donate_argnums,
    in_shardings=sharding,
    out_shardings=sharding,
  )
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  with _gpu_is_cuda(), use_abstract_mesh(mesh.abstract_mesh):
    lowered = jitted.trace(*args).lower(lowering_platforms=("cuda",))
    with _kept_reports() as folder:
      # Else XLA takes the assembler of NVIDIA's wheel, or that on PATH.
      executable = lowered.compile(
        compiler_options={"xla_gpu_cuda_data_dir": str(folder)}
      )
      reports = [path.read_text() for path in folder.glob("*.report")]
  memory = executable.memory_analysis()
  return Compiled(
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    hlo=executable.as_text(),
    kernels=tuple(kernel for text in reports for kernel in _read(text)),
  )


@functools.cache
def _mesh(target: str) -> Mesh:
  """One device that is known by its description only."""
  _find_ptxas()
  try:
    topology = topologies.get_topology_desc(
      platform="cuda",
      target_config=_TARGET.format(**_TARGETS[target]),
      topology="1x1x1",
    )
  except RuntimeError as error:
    raise RuntimeError(
      f"compile_for: the CUDA plugin of jax is missing; {_INSTALL}: {error}"
    ) from error
  return Mesh(np.array(topology.devices[:1]), ("device",))


def _find_ptxas() -> str:
  """That on PATH, or the one of NVIDIA's wheel."""
  wheel = pathlib.Path(jax.__file__).parents[1] / "nvidia"
  for found in (shutil.which("ptxas"), *wheel.glob("*/bin/ptxas")):
    if found:
      return str(found)
  raise RuntimeError(f"compile_for: ptxas is not on PATH; {_INSTALL}")


@contextlib.contextmanager
def _gpu_is_cuda() -> Iterator[None]:
  """Lets jax find out that `gpu` means CUDA where no GPU is there to ask.

  The one private name of this file.
  """
  from jax._src import xla_bridge

  known = xla_bridge.canonicalize_platform
  xla_bridge.canonicalize_platform = lambda name: (
    "cuda" if name in ("gpu", "cuda") else known(name)
  )
  try:
    yield
  finally:
    xla_bridge.canonicalize_platform = known


@contextlib.contextmanager
def _kept_reports() -> Iterator[pathlib.Path]:
  """A folder that holds what `ptxas` reports inside this block."""
  folder = _toolkit()
  for path in folder.glob("*.report"):
    path.unlink()
  # XLA is told of the toolkit, Mosaic looks on PATH.
  path = os.environ.get("PATH", "")
  os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{path}"
  try:
    yield folder
  finally:
    os.environ["PATH"] = path


@functools.cache
def _toolkit() -> pathlib.Path:
  """A toolkit of an assembler alone, whose reports are kept."""
  ptxas = _find_ptxas()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="ptxas_reports_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  wrapper = folder / "bin" / "ptxas"
  wrapper.parent.mkdir()
  wrapper.write_text(_WRAPPER.format(folder=folder, ptxas=ptxas))
  wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
  return folder


def _read(report: str) -> list[Kernel]:
  """The kernels that a report of `ptxas -v` names."""

  def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0

  _, *parts = re.split(r"Compiling entry function '", report)
  return [
    Kernel(
      name=part[: part.index("'")],
      registers=number(r"Used (\d+) registers", part),
      spill_stores=number(r"(\d+) bytes spill stores", part),
      spill_loads=number(r"(\d+) bytes spill loads", part),
      shared_bytes=number(r"(\d+) bytes smem", part),
    )
    for part in parts
  ]
