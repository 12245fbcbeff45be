"""What the compilers say of every kernel, in a file and as tables.

    python -m pallas_kernels.aot.report [--only=v5e/.*] [--tables]

Compiles the operators at the shapes of `cases` for TPUs and GPUs that need not
be there, merges what is found into `report.json` beside this file, and writes
the tables of `pallas_kernels/README.md` from that. About half an hour for all;
`--tables` compiles nothing.
"""

import importlib.metadata
import json
import pathlib
import re
import tempfile
from typing import Any

import jax
from absl import app, flags

from pallas_kernels import dispatch
from pallas_kernels.aot import cases, cuda, hlo, tpu, triton_target

_ONLY = flags.DEFINE_string(
  "only", "", "Regular expression of target/implementation/case; all if empty."
)
_TABLES = flags.DEFINE_bool("tables", False, "Only write the tables anew.")

REPORT = pathlib.Path(__file__).with_name("report.json")
README = pathlib.Path(__file__).parents[1] / "README.md"
MARK = "<!-- tables: written by pallas_kernels.aot.report -->"
CAPABILITIES = {"a100": 80, "h100": 90}


def main(argv) -> None:
  """Compiles, merges, writes."""
  del argv
  report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
  if not _TABLES.value:
    report["compilers"] = {
      "jax": jax.__version__,
      "libtpu": importlib.metadata.version("libtpu"),
    }
    with tempfile.TemporaryDirectory() as folder:
      tpu.keep_schedules(folder)
      for key in entries():
        if re.match(_ONLY.value, key):
          report.pop(key, None)
          found = compile_entry(key)
          if found is not None:
            report[key] = found
            print(key, json.dumps(found), flush=True)
          # At once, for a stop in the middle shall lose nothing.
          text = json.dumps(report, indent=1, sort_keys=True)
          REPORT.write_text(text + "\n")
  head = README.read_text().split(MARK)[0]
  README.write_text(head + MARK + "\n\n" + tables(report))


def entries() -> list[str]:
  """`target/implementation/case`, each a program."""
  found = []
  for name in cases.all_cases():
    operator = name.split("/")[0]
    is_search = operator.startswith(("top_k", "product_key"))
    found += [f"{target}/pallas_tpu/{name}" for target in tpu.TOPOLOGIES]
    # The path to compare with; its bytes are much the same on every chip.
    found.append(f"v5e/xla/{name}")
    for target in CAPABILITIES:
      gpu = "jax_triton" if is_search else "pallas_gpu"
      found.append(f"{target}/{gpu}/{name}")
      # The compiler itself ends if Mosaic GPU is asked for Ampere.
      if target == "h100" and operator in (
        "sparse_gather",
        "sparse_gather_and_weights_grad",
      ):
        found.append(f"{target}/mosaic_gpu/{name}")
    found.append(f"h100/xla/{name}")
  return found


def compile_entry(key: str) -> dict[str, Any] | None:
  """What the compiler says; None for what the kernel does not take."""
  target, implementation, name = key.split("/", 2)
  case = cases.all_cases()[name]
  platform = "tpu" if target in tpu.TOPOLOGIES else "gpu"
  with dispatch.use(implementation, platform=platform):
    try:
      moved = cases.kernel_bytes(case.fn, *case.arguments)
    except NotImplementedError:
      return None
    compile_fn = {
      "pallas_tpu": _compile_tpu,
      "jax_triton": _compile_triton,
    }.get(implementation, _compile_tpu if platform == "tpu" else _compile_cuda)
    found = compile_fn(target, case)
  return {"kernel_bytes": moved} | found


def _compile_tpu(target: str, case: cases.Case) -> dict[str, Any]:
  program = tpu.compile_for(
    target, case.fn, *case.arguments, donate_argnums=case.donate
  )
  return {
    "temp_bytes": program.temp_bytes,
    "alias_bytes": program.alias_bytes,
    "accessed_bytes": program.accessed_bytes,
  } | program.schedule._asdict()


def _compile_cuda(target: str, case: cases.Case) -> dict[str, Any]:
  program = cuda.compile_for(
    target, case.fn, *case.arguments, donate_argnums=case.donate
  )
  return {
    "temp_bytes": program.temp_bytes,
    "alias_bytes": program.alias_bytes,
    "accessed_bytes": hlo.moved_bytes(program.hlo),
    "registers": max((k.registers for k in program.kernels), default=0),
    "spill_bytes": sum(k.spill_stores + k.spill_loads for k in program.kernels),
  }


def _compile_triton(target: str, case: cases.Case) -> dict[str, Any]:
  with triton_target.triton_target(CAPABILITIES[target]) as kernels:
    found = _compile_cuda(target, case)
    resources = [triton_target.resources(kernel) for kernel in kernels]
  return found | {
    "registers": max(r.registers for r in resources),
    "spill_bytes": sum(r.spill_bytes for r in resources),
  }


def tables(report: dict[str, Any]) -> str:
  """The tables of README.md."""
  return (
    _tpu_table(report)
    + "\n"
    + _gpu_table(report)
    + "\nCompiled by "
    + ", ".join(f"{k} {v}" for k, v in report["compilers"].items())
    + ".\n"
  )


def _tpu_table(report: dict[str, Any]) -> str:
  lines = [
    "### TPU",
    "",
    "| operator and shape | kernel moves, MB | fused minimum | ratio | "
    "compulsory minimum | ratio | XLA moves | kernel holds beside, MB | "
    "XLA holds | bundles v5e / v5p / v6e | vector spills | scalar spills |",
    "| --- " + "| ---: " * 11 + "|",
  ]
  for name, case in cases.all_cases().items():
    found = [report.get(f"{t}/pallas_tpu/{name}") for t in tpu.TOPOLOGIES]
    xla = report.get(f"v5e/xla/{name}")
    if None in (found[0], xla):
      continue
    moved = found[0]["kernel_bytes"]
    counts = " | ".join(_counts(found, key) for key in tpu.Schedule._fields)
    lines.append(
      f"| {name} | {_mb(moved)} | {_mb(case.fused_bytes)} | "
      f"{moved / case.fused_bytes:.2f} | {_mb(case.compulsory_bytes)} | "
      f"{moved / case.compulsory_bytes:.2f} | {_mb(xla['accessed_bytes'])} | "
      f"{_mb(found[0]['temp_bytes'])} | {_mb(xla['temp_bytes'])} | {counts} |"
    )
  return "\n".join(lines) + "\n"


def _counts(found: list[dict[str, Any] | None], key: str) -> str:
  """One number a target; a dash for what has not been compiled."""
  values = [None if x is None else x.get(key) for x in found]
  return " / ".join("-" if x is None else f"{x:,}" for x in values)


def _gpu_table(report: dict[str, Any]) -> str:
  lines = [
    "### GPU",
    "",
    "| operator and shape | kernel | kernel moves, MB | fused minimum | "
    "compulsory minimum | XLA moves | kernel holds beside, MB | XLA holds | "
    "registers A100 / H100 | spilled bytes |",
    "| --- | --- " + "| ---: " * 8 + "|",
  ]
  for name, case in cases.all_cases().items():
    for implementation in ("pallas_gpu", "mosaic_gpu", "jax_triton"):
      found = [report.get(f"{t}/{implementation}/{name}") for t in CAPABILITIES]
      xla = report.get(f"h100/xla/{name}")
      if None in (found[-1], xla):
        continue
      # Mosaic's kernels move the same, and have no estimate of their own.
      key = f"h100/{implementation.replace('mosaic', 'pallas')}/{name}"
      moved = report[key]["kernel_bytes"]
      registers = " / ".join(
        "-" if x is None else str(x["registers"]) for x in found
      )
      spilled = sum(x["spill_bytes"] for x in found if x is not None)
      lines.append(
        f"| {name} | {implementation} | {_mb(moved)} | "
        f"{_mb(case.fused_bytes)} | {_mb(case.compulsory_bytes)} | "
        f"{_mb(xla['accessed_bytes']) if 'accessed_bytes' in xla else '-'} | "
        f"{_mb(found[-1]['temp_bytes'])} | "
        f"{_mb(xla['temp_bytes'])} | {registers} | "
        f"{spilled} |"
      )
  return "\n".join(lines) + "\n"


def _mb(size: float) -> str:
  return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


if __name__ == "__main__":
  app.run(main)
