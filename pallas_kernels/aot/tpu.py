"""The TPU compiler, on a machine without a TPU.

It says what a device is not needed for: memory, copies, the length of the
program. It does not time anything.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Without the first four the compiler looks for chips for some seconds and
# complains; without the last only one process at a time may compile.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# What the compiler writes down of a program: a summary of its schedule, and
# the schedule itself with the next number in its name.
_SUMMARIES = "*-schedule-analysis_final_bundles.txt"
# A register that is stored, or read back, for want of registers.
_SPILL = re.compile(
  r"\b([vs])(?:st|ld)\S*(?: \S+)? \[[vs]mem:\[#allocation\d+_spill"
)


class Schedule(NamedTuple):
  """Instructions of all kernels of a program, a loop's once.

  Attributes:
    bundles: Instructions, each of several operations.
    vector_spills: Operations among them that store or load a vector register
      for want of registers.
    scalar_spills: The same of scalar registers, which go to a memory of their
      own: addresses and counters of the loops around a kernel.
  """

  bundles: int
  vector_spills: int
  scalar_spills: int


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program for a TPU.

  Attributes:
    argument_bytes: Of all arguments.
    output_bytes: Of all results.
    alias_bytes: Of the results that lie where a donated argument lay.
    temp_bytes: Of all else that is held while it runs.
    accessed_bytes: What XLA's operators move; of a kernel what its cost
      estimate says.
    hlo: The optimised program, as text.
    schedule: Of all kernels together; None where the compiler was not told to
      write it down, see `keep_schedules`.
  """

  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  accessed_bytes: int
  hlo: str
  schedule: Schedule | None


def compile_for(
  target: str,
  fn: Callable[..., Any],
  *args: Any,
  donate_argnums: int | Sequence[int] = (),
) -> Compiled:
  """Compiles a function for one chip that need not be there.

  Args:
    target: `v5e`, `v5p` or `v6e`.
    fn: Function of arrays; jitted here. Kernels of this package need
      `dispatch.use(name, platform="tpu")` around the call.
    *args: Arrays or `jax.ShapeDtypeStruct`s, or trees of them.
    donate_argnums: As `jax.jit` takes them.

  Raises:
    ValueError: For an unknown target.
    RuntimeError: If the compiler is missing, with what to install.

  Example:
    >>> x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    >>> compile_for("v5e", lambda x: x + 1, x).temp_bytes
    0
  """
  if target not in TOPOLOGIES:
    raise ValueError(
      f"compile_for: unknown target {target!r}; there are "
      + ", ".join(TOPOLOGIES)
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
  with use_abstract_mesh(mesh.abstract_mesh):
    lowered = jitted.trace(*args).lower(lowering_platforms=("tpu",))
  executable = lowered.compile()
  memory = executable.memory_analysis()
  return Compiled(
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    accessed_bytes=int(executable.cost_analysis().get("bytes accessed", 0)),
    hlo=executable.as_text(),
    schedule=_take_schedule(),
  )


def keep_schedules(folder: str | os.PathLike[str]) -> None:
  """Lets the compiler write into `folder`; call it before the first program.

  50 MB a program, which are removed when they have been read.
  """
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  )


def _take_schedule() -> Schedule | None:
  """Of the kernels compiled since the last call."""
  found = re.search(
    r"--xla_jf_dump_to=(\S+)", os.environ.get("LIBTPU_INIT_ARGS", "")
  )
  if not found:
    return None
  folder = pathlib.Path(found[1])
  total = Schedule(0, 0, 0)
  for path in folder.glob(_SUMMARIES):
    summary = path.read_text()
    if 'custom_call_target="tpu_custom_call"' in summary:
      total = Schedule(*map(sum, zip(total, _read(path, summary), strict=True)))
  shutil.rmtree(folder)
  folder.mkdir()
  return total


def _read(path: pathlib.Path, summary: str) -> Schedule:
  """One kernel, or what calls it, by the summary of its schedule."""
  name, number = path.name.removesuffix(_SUMMARIES[1:]).rsplit("-", 1)
  bundles = path.with_name(f"{name}-{int(number) + 1:02}-final_bundles.txt")
  spilled = [match[1] for match in _SPILL.finditer(bundles.read_text())]
  return Schedule(
    int(re.search(r"total scheduled bundles:\s+(\d+)", summary)[1]),
    spilled.count("v"),
    spilled.count("s"),
  )


@functools.cache
def _mesh(target: str) -> Mesh:
  """One chip that is known by its description only."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=TOPOLOGIES[target]
    )
  except Exception as error:  # The plugin raises what it likes.
    raise RuntimeError(
      "compile_for: no TPU compiler; install it with: pip install "
      f"'recjax[aot]' ({' '.join(str(error).split())[:200]})"
    ) from error
  return Mesh(np.array(topology.devices[:1]), ("device",))
