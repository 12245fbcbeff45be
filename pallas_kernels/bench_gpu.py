r"""Times the operators on a GPU: the kernels, XLA, and torch where it has one.

    python -m pallas_kernels.bench_gpu [--only=top_k] [--json=FILE]

Medians of `--repeats` rounds after two of warming up, in milliseconds, all
sides in turns on the same inputs; the least bytes that a kernel which reads
every row once a use must move, by the time taken, as a share of the device's
own copying, measured in the same run. Peers: `torch.topk`, and
`torch.nn.functional.embedding_bag` with weights. Values are compared by
`make test-gpu`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import pallas_kernels
from pallas_kernels.aot import cases

_ONLY = flags.DEFINE_string("only", "", "Cases whose name holds this.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Rounds.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("json", "", "File for the rows as JSON.")
IMPLEMENTATIONS = ("pallas_gpu", "mosaic_gpu", "jax_triton", "xla")
_COPY_BYTES = 2**30


def main(argv) -> None:
  """Measures and prints."""
  del argv
  if jax.default_backend() != "gpu":
    print(
      "bench_gpu: needs a GPU, and jax found only "
      f"{jax.default_backend()}; install the gpu extra on a machine with one",
      file=sys.stderr,
    )
    sys.exit(2)
  bandwidth = copy_bandwidth()
  print(f"{jax.devices()[0].device_kind}: copies {bandwidth / 1e9:.0f} GB/s")
  rows = []
  for name, case in cases.all_cases().items():
    if _ONLY.value in name:
      sides = make_sides(name, case)
      millis = measure(sides)
      for side, value in millis.items():
        share = case.fused_bytes / (value / 1e3) / bandwidth
        rows.append({"case": name, "side": side, "ms": value, "share": share})
        print(f"{name:<44}{side:<14}{value:>9.3f} ms{share:>7.0%}", flush=True)
  if _OUTPUT.value:
    with open(_OUTPUT.value, "w") as file:
      json.dump(rows, file, indent=1)


def copy_bandwidth() -> float:
  """Bytes a second that the device reads and writes in a plain copy."""
  x = jnp.zeros((_COPY_BYTES // 4,), jnp.float32)
  step = jax.jit(lambda x: x + 1)
  millis = measure({"copy": lambda: step(x).block_until_ready()})["copy"]
  return 2 * _COPY_BYTES / (millis / 1e3)


def make_sides(name: str, case: cases.Case) -> dict[str, Callable[[], Any]]:
  """What runs each side of a case to its end; those that take it."""
  arguments = case.make_arguments()
  sides = {}
  for implementation in IMPLEMENTATIONS:
    step = jax.jit(lambda *x: case.fn(*x), donate_argnums=case.donate)
    with pallas_kernels.use(implementation):
      try:
        compiled = step.lower(*arguments).compile()
      except NotImplementedError:
        continue
      except ValueError as error:
        if "unknown implementation" not in str(error):
          raise
        continue
    sides[implementation] = _Runner(compiled, arguments, case.donate)
  return sides | _torch_side(name, arguments)


class _Runner:
  """Calls a program whose donated arguments are its results."""

  def __init__(self, program, arguments, donate):
    self._program, self._donate = program, donate
    # Each side gives its own arrays away.
    self._arguments = [jax.tree.map(jnp.copy, x) for x in arguments]

  def __call__(self):
    results = jax.block_until_ready(self._program(*self._arguments))
    for place, result in zip(self._donate, results, strict=False):
      self._arguments[place] = result


def _torch_side(name: str, arguments) -> dict[str, Callable[[], Any]]:
  """The same by torch on the same device, where it has an operator for it."""
  operator = name.split("/")[0]
  if operator not in ("top_k", "sparse_gather"):
    return {}
  import torch

  tensors = [torch.from_dlpack(x) for x in arguments]

  def top_k():
    from pallas_kernels.top_k.arg_specs import ARG_SPECS

    torch.topk(tensors[0], ARG_SPECS[name.split("/")[1]][1])
    torch.cuda.synchronize()

  def bag():
    table, indices, weights = tensors
    k = indices.shape[-1]
    torch.nn.functional.embedding_bag(
      indices.reshape(-1, k),
      table,
      mode="sum",
      per_sample_weights=weights.reshape(-1, k),
    )
    torch.cuda.synchronize()

  if operator == "top_k":
    return {"torch.topk": top_k}
  return {"torch bag": bag}


def measure(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
  """Median milliseconds of each side, taken in turns."""
  times = {side: [] for side in sides}
  for round_number in range(_REPEATS.value + 2):
    for side, run in sides.items():
      start = time.perf_counter()
      run()
      if round_number >= 2:
        times[side].append(1e3 * (time.perf_counter() - start))
  return {side: statistics.median(found) for side, found in times.items()}


if __name__ == "__main__":
  app.run(main)
