r"""Measures what scenarios and tasks cost: training steps, paired.

    python -m experiments.bench_mdl [--scenarios=3,10,30,100] [--tasks=2,8,30]

Trains MDL with every number of scenarios (at 2 tasks) and of tasks (at 3
scenarios), and RankMixer with MMoE at as many dense parameters, in turns in
one process, so that a busy machine slows all alike. Prints a line a size, the
ratios of paired steps with their quartiles, and the same as JSON.

First it checks that what is timed is right: logits and gradients of MDL's
sorted blocks equal those of weights gathered for every example. Exits with code
1 if they do not, if the most scenarios take more than 2.5 times a step of the
fewest, or if MDL takes more than 1.3 times a step of MMoE.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import bench_data, door
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import run_files, train_state
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import grouped
from recjax.schema import Feature, Label, Roles, Schema

# Benchmarks share names of flags; tests import several of them.
_SCENARIOS = flags.DEFINE_list(
  "scenarios", ["3", "10", "30", "100"], "Numbers of scenarios."
)
_TASKS = flags.DEFINE_list("tasks", ["2", "8", "30"], "Numbers of tasks.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 2048, "Examples a step.", allow_override=True
)
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 8, "Feature tokens.")
_TOKEN_DIM = flags.DEFINE_integer(
  "token_dim", 64, "Width of a token.", allow_override=True
)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 2, "Blocks.")
_REPEATS = flags.DEFINE_integer(
  "repeats", 10, "Timed steps of each.", allow_override=True
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of parameters and batches.", allow_override=True
)

MAX_SCENARIO_RATIO = 2.5
MAX_MMOE_RATIO = 1.3
_NUM_ROWS = 10_000


def main(argv) -> None:
  """Runs the benchmark."""
  del argv
  scenarios = _numbers("scenarios", _SCENARIOS.value)
  tasks = _numbers("tasks", _TASKS.value)
  error = check_blocks(scenarios[-1], _BATCH_SIZE.value, _SEED.value)
  print(f"sorted blocks against gathered weights: error {error:.1e}")
  cases = {}
  for num in scenarios:
    cases[f"mdl {num} scenarios"] = Case("mdl", num, tasks[0])
  for num in tasks[1:]:
    cases[f"mdl {num} tasks"] = Case("mdl", scenarios[0], num)
  first = cases[f"mdl {scenarios[0]} scenarios"]
  cases["mmoe"] = widest_mmoe(first.params, scenarios[0], tasks[0])
  for i in range(_REPEATS.value + 1):
    # The order turns, so that none always follows the same other.
    for case in list(cases.values())[:: 1 if i % 2 else -1]:
      case.run()
  rows = {name: case.summary() for name, case in cases.items()}
  print(f"{'model':<20}{'params':>10}{'active':>10}{'FLOPs':>12}{'step':>10}")
  for name, row in rows.items():
    print(
      f"{name:<20}{row['params'] / 1e6:>9.2f}M{row['active'] / 1e6:>9.2f}M"
      f"{row['flops']:>12,.0f}{1e3 * row['step_secs']:>7.1f} ms"
    )
  most = cases[f"mdl {scenarios[-1]} scenarios"]
  ratios = {
    "scenarios": paired_ratio(most, first),
    "mmoe": paired_ratio(first, cases["mmoe"]),
  }
  for num in tasks[1:]:
    ratios[f"{num}_tasks"] = paired_ratio(cases[f"mdl {num} tasks"], first)
  for name, (low, middle, high) in ratios.items():
    print(f"ratio {name}: {middle:.2f} (quartiles {low:.2f} ... {high:.2f})")
  print(
    json.dumps(
      {
        "error": error,
        "cases": rows,
        "ratios": ratios,
        "batch_size": _BATCH_SIZE.value,
        "repeats": _REPEATS.value,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
      }
    )
  )
  sys.exit(
    int(
      error > 1e-3
      or ratios["scenarios"][1] > MAX_SCENARIO_RATIO
      or ratios["mmoe"][1] > MAX_MMOE_RATIO
    )
  )


class Case:
  """One model and its training step."""

  def __init__(self, name: str, num_scenarios: int, num_tasks: int, **words):
    schema = make_schema(num_scenarios, num_tasks)
    model = dict(
      tasks=tuple(label.name for label in schema.labels),
      num_tokens=_NUM_TOKENS.value,
      token_dim=_TOKEN_DIM.value,
      num_layers=_NUM_LAYERS.value,
    )
    self.method = method_lib.load(name, model | words, schema)
    self.counts = run_files.count_params(self.method)
    self.params = self.counts["dense"]
    self.secs: list[float] = []
    self._step = None

  def run(self) -> None:
    """Times one step; the first compiles."""
    if self._step is None:
      self._compile()
    start = time.perf_counter()
    self._state, scalars = jax.block_until_ready(
      self._step(self._state, self._batch)
    )
    self.secs.append(time.perf_counter() - start)
    if not np.isfinite(float(scalars["loss"][0])):
      raise RuntimeError(f"loss {scalars['loss'][0]}")

  def summary(self) -> dict[str, Any]:
    """What it holds and what it took."""
    return {
      "params": self.params,
      "active": self.counts["active"],
      "flops": run_files.count_flops(self.method, _BATCH_SIZE.value),
      "step_secs": statistics.median(self.secs[1:]),
    }

  def _compile(self) -> None:
    config = train_state.StepConfig(
      self.method,
      self.method.stages[0],
      optimizer_lib.Config(),
      num_steps=_REPEATS.value + 1,
    )
    init = functools.partial(train_state.init_state, config=config)
    self._state = jax.jit(init)(jax.random.key(_SEED.value))
    self._batch = make_batch(self.method.schema, _BATCH_SIZE.value, _SEED.value)
    self._step = jax.jit(
      functools.partial(train_state.train_step, config=config),
      donate_argnums=0,
    )


def widest_mmoe(num_params: int, num_scenarios: int, num_tasks: int) -> Case:
  """RankMixer with MMoE whose trunk is as wide as `num_params` allow."""
  ratios = np.arange(2.0, 66.0, 1 / 16)  # Whole ones would miss by a sixth.

  def case(i: int) -> Case:
    ratio = float(ratios[i])
    return Case("mmoe", num_scenarios, num_tasks, mlp_ratio=ratio, head_dim=32)

  low, high = 0, len(ratios) - 1
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (
      (middle, high) if case(middle).params <= num_params else (low, middle - 1)
    )
  return case(low)


def make_schema(num_scenarios: int, num_tasks: int) -> Schema:
  """The benchmarks' schema with scenarios and tasks."""
  schema = bench_data.make_schema(_NUM_ROWS)
  return dataclasses.replace(
    schema,
    features=(*schema.features, Feature("scenario", "sparse")),
    labels=tuple(Label(f"task_{i}") for i in range(num_tasks)),
    roles=Roles(scenario="scenario"),
    vocab_sizes={**schema.vocab_sizes, "scenario": num_scenarios + 1},
  )


def make_batch(schema: Schema, batch_size: int, seed: int) -> Batch:
  """Random examples; scenario k comes 1 / k as often as the first."""
  rng = np.random.default_rng(seed)
  batch = bench_data.make_batch(rng, schema, batch_size)
  num = schema.num_scenarios - 1
  shares = 1.0 / np.arange(1, num + 1)
  scenario = 1 + rng.choice(num, size=batch_size, p=shares / shares.sum())
  labels = {
    label.name: (rng.random(batch_size) < 0.3).astype(np.float32)
    for label in schema.labels
  }
  return batch.replace(
    ids={**batch.ids, "scenario": scenario.astype(np.int32)},
    scenario=scenario.astype(np.int32),
    labels=labels,
    label_mask={name: np.ones(batch_size, bool) for name in labels},
  )


def check_blocks(num_groups: int, batch_size: int, seed: int) -> float:
  """Largest error of blocks against weights gathered for every example.

  Values, and gradients of inputs and weights, relative to the largest number.
  """
  rng = np.random.default_rng(seed)
  group = jnp.asarray(rng.integers(num_groups, size=batch_size))
  x = jnp.asarray(rng.standard_normal((batch_size, 16), np.float32))
  kernel = rng.standard_normal((num_groups, 16, 16), np.float32)

  def by_blocks(x, kernel):
    blocks = grouped.sort_into_blocks(group, num_groups)
    y = grouped.grouped_product(blocks.pack(x), kernel, blocks.group_id)
    return blocks.unpack(y)

  def by_rows(x, kernel):
    return jnp.einsum("bi,bio->bo", x, kernel[group])

  outputs = []
  for f in (by_blocks, by_rows):
    grad = jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1))
    args = (x, jnp.asarray(kernel))
    outputs.append((jax.jit(f)(*args), *jax.jit(grad)(*args)))
  return max(
    float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    for a, b in zip(*outputs, strict=True)
  )


def paired_ratio(case: Case, base: Case) -> tuple[float, float, float]:
  """Quartiles of the ratio of steps that ran in the same turn."""
  ratios = np.array(case.secs[1:]) / np.array(base.secs[1:])
  return tuple(float(q) for q in np.percentile(ratios, (25, 50, 75)))


def _numbers(flag: str, values: list[str]) -> list[int]:
  try:
    numbers = sorted({int(value) for value in values})
  except ValueError:
    numbers = []
  if not numbers or numbers[0] < 1:
    raise UserError(
      f"--{flag} must be whole numbers of at least 1, got {','.join(values)}; "
      f"write for example --{flag}=3,100"
    )
  return numbers


if __name__ == "__main__":
  door.run(main)
