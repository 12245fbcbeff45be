"""The files of a workdir: what a run is, and what came out."""

import difflib
import json
import pathlib
import re
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import pallas_kernels
from recjax import evaluate as evaluate_lib
from recjax import optimizer as optimizer_lib
from recjax.errors import UserError
from recjax.method import Method, empty_batch
from recjax.schema import suggest
from recjax.writer import write_json

BLOCKS = ("model", "data", "optimizer", "train", "parallel")


def check_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
  """A plain copy of a run's config; missing blocks become empty.

  Raises:
    UserError: For an unknown key or one that is missing.
  """
  known = ("model_name", "label", "seed", *BLOCKS)
  for key in config:
    if key not in known:
      raise UserError(f"unknown key config.{key}" + suggest(key, known))
  config = json.loads(json.dumps(config, default=_plain))
  for key in ("model_name", "data"):
    if not config.get(key):
      raise UserError(f"config.{key} is missing; set it")
  for block in BLOCKS:
    config.setdefault(block, {})
    if not isinstance(config[block], dict):
      raise UserError(f"config.{block} must be a block of keys")
  if "name" not in config["data"]:
    raise UserError("config.data.name is missing; set it, for example to table")
  seed = config.setdefault("seed", 0)
  # JAX would take a larger one modulo 2 ** 32.
  if type(seed) is not int or not 0 <= seed < 2**32:
    raise UserError(
      f"config.seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}"
    )
  return config


def claim_workdir(
  workdir: pathlib.Path, config: dict[str, Any], commit: str | None
) -> None:
  """Writes `config.json`, or checks that the workdir's run has this config."""
  check_workdir(workdir, config)
  path = workdir / "config.json"
  if path.exists():
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"{workdir}: cannot be made ({error.strerror}); use another --workdir"
    ) from error
  if jax.process_index() == 0:
    write_json(path, {**config, "commit": commit or git_commit()})


def check_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Raises a `UserError` if the workdir holds a run with another config."""
  path = workdir / "config.json"
  if not path.exists():
    return
  # A run may go on in another place; see `recjax.checkpoint`.
  before, config = (
    {key: c[key] for key in c if key not in ("commit", "parallel")}
    for c in (_read_json(path, "model_name"), config)
  )
  if before != config:
    lines = lambda c: json.dumps(c, indent=1, sort_keys=True).split("\n")  # noqa: E731
    changed = [
      " ".join(line.split())
      for line in difflib.ndiff(lines(before), lines(config))
      if line[0] in "+-"
    ]
    raise UserError(
      f"{workdir}: holds a run with another config "
      f"({'; '.join(changed[:4])}); use another --workdir"
    )


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What `result.json` holds; None before the end of a run."""
  path = workdir / "result.json"
  return _read_json(path, "metrics") if path.exists() else None


def write_result(
  workdir: pathlib.Path,
  method: Method,
  evaluation: evaluate_lib.Evaluation,
  result: dict[str, Any],
) -> dict[str, Any]:
  """Writes predictions, diagnostics and, last of all, `result.json`."""
  result = {
    **result,
    "params": count_params(method),
    "flops_per_example": count_flops(method),
  }
  if jax.process_index() == 0:
    arrays = {}
    for name, value in evaluation.examples.items():
      if isinstance(value, dict):
        arrays |= {f"{name}/{key}": array for key, array in value.items()}
      else:
        arrays[name] = value
    np.savez_compressed(workdir / "predictions.npz", **arrays)
    write_json(
      workdir / "diagnostics.json",
      evaluate_lib.diagnostics(evaluation, method),
    )
    write_json(workdir / "result.json", result)
  return result


def count_params(method: Method) -> dict[str, int]:
  """Trained numbers: `dense`, `sparse` (tables), and `active`.

  `active` are the dense ones but those of idle experts and of other scenarios,
  and the table entries that one example reads.
  """
  params, _, reads = _shapes(method)
  dense = sum(leaf.size for leaf in jax.tree.leaves(params))
  trained = {n: t for n, t in method.tables.items() if t.trained}
  sparse = sum(table.num_rows * table.dim for table in trained.values())
  batch = empty_batch(method.schema, method.tasks)
  active = sum(
    ids.size * method.tables[name].dim
    for name, ids in jax.eval_shape(method.ids, batch).items()
    if name in trained
  )
  active += sum(
    entry["ids"].size * method.tables[name].dim for name, entry in reads.items()
  )
  idle_params = getattr(method.module, "idle_params", lambda config: 0)
  active += (
    dense - idle_params(method.config) - _other_scenarios(method, params)
  )
  return {"dense": dense, "sparse": sparse, "active": active}


def _other_scenarios(method: Method, params: Any) -> int:
  """Parameters of the scenarios that an example does not belong to."""
  patterns = getattr(method.module, "PER_SCENARIO", ())
  idle = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = optimizer_lib.path_name(path)
    if any(re.fullmatch(pattern, name) for pattern in patterns):
      idle += leaf.size - leaf.size // leaf.shape[0]
  return idle


def count_flops(method: Method, batch_size: int = 64) -> float:
  """Operations of one example's forward pass, 2 per multiply-add.

  XLA's own count of the unoptimised program, which is what results record;
  `recjax.flops.count_flops` counts without XLA and tells the modules apart.
  """
  params, tables, _ = _shapes(method)
  batch = jax.eval_shape(
    lambda: empty_batch(method.schema, method.tasks, batch_size)
  )

  def run(params, tables, batch):
    # A kernel does not say what it computes.
    with pallas_kernels.use("xla"):
      rows = method.read(tables, batch)
      return method.apply(params, tables, rows, batch, train=False)[0]

  lowered = jax.jit(run).lower(params, tables, batch)
  return float(lowered.cost_analysis()["flops"]) / batch_size


def git_commit() -> str:
  """Commit of the working tree, or `unknown` outside a checkout."""
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=12"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _shapes(method: Method):
  def build(rng):
    params, tables = method.init(rng)
    batch = empty_batch(method.schema, method.tasks)
    rows = method.read(tables, batch)
    reads = method.apply(params, tables, rows, batch, train=False)[2]
    return params, tables, reads

  return jax.eval_shape(build, jax.random.key(0))


def _read_json(path: pathlib.Path, key: str) -> dict[str, Any]:
  """An object that holds `key`, as every such file of a run does."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    content = None
  if not isinstance(content, dict) or key not in content:
    raise UserError(
      f"{path}: is no JSON object with the key {key!r}, so it is damaged or "
      "not of a run; delete it or use another --workdir"
    )
  return content


def _plain(value: Any):
  """Config containers that JSON does not know."""
  if hasattr(value, "to_dict"):
    return value.to_dict()
  if isinstance(value, (set, frozenset, tuple)):
    return list(value)
  raise UserError(f"config: {value!r} is no plain value")
