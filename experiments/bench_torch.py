r"""Times training steps of recjax beside the same models in PyTorch.

    pip install torch==2.13.0
    python -m experiments.bench_torch [--threads=1,2] [--check]

RankMixer and MSN of the `base` recipes on batches of the KuaiRand log; a step
is forward, loss, backward and update of dense parameters and tables. For every
number of threads, in a process of its own: the weights of a fresh state go to
PyTorch, one step of both is compared, and then steps of recjax, of PyTorch and
of `torch.compile` (of forward and backward) are timed in turns, so that a busy
machine slows all alike. Beside them run the matrix products of recjax's step
alone, and MSN with larger memories.

Prints medians, and in the last line the same as JSON. Expected are 1.2 times
the speed of PyTorch, that of `torch.compile`, and that 1024 ** 2 slots take at
most 1.5 times as long as 256 ** 2; with `--check` a miss ends in exit code 1.
The comparison of results is never optional. Takes some minutes.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.extend import core

from experiments import door
from recjax import config as config_lib
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import train_state
from recjax.batch import Batch
from recjax.data.pipeline import make_loader, open_dataset
from recjax.errors import UserError
from recjax.train_state import StepConfig

_THREADS = flags.DEFINE_list("threads", ["1", "2"], "Numbers of threads.")
_MEMORIES = flags.DEFINE_list(
  "memories", ["256", "512", "1024"], "Keys per axis of the larger memories."
)
_STEPS = flags.DEFINE_integer("steps", 40, "Timed steps.", lower_bound=1)
_COMPILE = flags.DEFINE_boolean(
  "torch_compile", True, "Also time torch.compile."
)
_CHECK = flags.DEFINE_boolean("check", False, "Exit with code 1 on a miss.")
_WORKER = flags.DEFINE_boolean(
  "worker", False, "Set by the command itself: measure in this process."
)

TORCH = "torch==2.13.0"
BATCH_SIZE = 512
# Of what PyTorch and `torch.compile` take over what recjax takes.
BARS = {"torch": 1.2, "torch.compile": 1.0}
MAX_GROWTH = 1.5  # From 256 ** 2 to 1024 ** 2 slots.
# Largest differences of the two in one step from the same weights: logits and
# loss; updates of parameters, each of about the learning rate of 1e-3; updates
# of rows, of about 1e-2.
TOLERANCES = {"output": 1e-4, "params": 5e-5, "rows": 1e-5}
# Share of examples in which rounding may settle a near tie between slots.
MAX_TIES = 0.01
_SEED = 0  # Of weights and batches.
_NUM_BATCHES = 8
_BLOCK = 4  # Steps in a turn.
_WARM_UP = 2  # Blocks that do not count; the first compiles.


def main(argv) -> None:
  """Runs the benchmark."""
  del argv
  threads = _numbers(_THREADS, least=1)
  sizes = _numbers(_MEMORIES, least=16)
  import_peer()
  if _WORKER.value:
    print(json.dumps(measure(threads[0], sizes)))
    return
  results = [run_worker(number) for number in threads]
  misses = []
  for result in results:
    misses += report(result)
  print(
    json.dumps(
      {
        "threads": results,
        "misses": misses,
        "batch_size": BATCH_SIZE,
        "steps": _STEPS.value,
        "jax": jax.__version__,
        "torch": TORCH.partition("==")[2],
      }
    )
  )
  sys.exit(int(bool(misses) and _CHECK.value))


def import_peer():
  """The models in PyTorch; a `UserError` without PyTorch."""
  try:
    return importlib.import_module("experiments.peers.torch_rankmixer")
  except ModuleNotFoundError as error:
    if error.name != "torch":
      raise
    raise UserError(
      f"PyTorch, which is compared with, is missing; pip install {TORCH}"
    ) from error


def run_worker(num_threads: int) -> dict[str, Any]:
  """What `measure` gives in a process that has so many threads."""
  # XLA counts its threads once in a process. Both compute on the CPU.
  variables = dict.fromkeys(("PJRT_NPROC", "OMP_NUM_THREADS"), str(num_threads))
  done = subprocess.run(
    [sys.executable, "-m", "experiments.bench_torch"]
    + [f"--{flag.name}={flag.value}" for flag in (_STEPS, _COMPILE)]
    + [f"--memories={','.join(_MEMORIES.value)}"]
    + [f"--threads={num_threads}", "--worker"],
    env={**os.environ, **variables, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    sys.exit(done.returncode)
  return json.loads(done.stdout.splitlines()[-1])


def measure(num_threads: int, sizes: list[int]) -> dict[str, Any]:
  """Compares results, then times everything in this process."""
  import_peer().torch.set_num_threads(num_threads)
  columns = open_dataset({"name": "kuairand"})
  loader = make_loader(
    columns,
    "train",
    batch_size=BATCH_SIZE,
    shuffle=True,
    seed=_SEED,
    num_threads=0,
  )
  batches = list(itertools.islice(loader, _NUM_BATCHES))
  steps = {name: make_step(name, columns.schema) for name in names(sizes)}
  differences = {
    name: compare(steps[name], batches[0], compiled=False)
    for name in ("rankmixer", "msn")
  }
  failure = "--notorch_compile was given"
  if _COMPILE.value:
    failure = compare_compiled([steps[n] for n in differences], batches[0])
  peers = ["torch"] if failure else list(BARS)
  races = {
    name: Race(step, batches, peers if name in differences else [])
    for name, step in steps.items()
  }
  for i in range(_WARM_UP + -(-_STEPS.value // _BLOCK)):
    if i == _WARM_UP:
      for race in races.values():
        race.clear()
    for race in races.values():
      race.run(i)
  return {
    "num_threads": num_threads,
    "differences": differences,
    "not_compiled": failure,
    "models": {name: race.summary() for name, race in races.items()},
  }


def names(sizes: list[int]) -> list[str]:
  """The models that are timed; `msn@256` has 256 ** 2 slots."""
  return ["rankmixer", "msn"] + [f"msn@{size}" for size in sizes]


def make_step(name: str, schema) -> StepConfig:
  """The training step of a `base` recipe."""
  recipe, _, num_keys = name.partition("@")
  module = importlib.import_module(f"experiments.configs.{recipe}")
  config = module.get_config("base").to_dict()
  if num_keys:
    config["model"]["memory"]["num_keys"] = int(num_keys)
  method = method_lib.load(recipe, config["model"], schema)
  optimizer = config_lib.build(
    optimizer_lib.Config, config["optimizer"], "config.optimizer"
  )
  num_steps = _STEPS.value + (_WARM_UP + 1) * _BLOCK
  return StepConfig(method, method.stages[0], optimizer, num_steps)


def init_state(step: StepConfig) -> train_state.TrainState:
  """A fresh state of recjax."""
  init = functools.partial(train_state.init_state, config=step)
  return jax.jit(init)(jax.random.key(_SEED))


class Disagreement(Exception):
  """The two libraries do not compute the same."""


def compare(
  step: StepConfig, batch: Batch, *, compiled: bool
) -> dict[str, float]:
  """Takes one step of both from the same weights.

  Without dropout, for no two libraries draw alike, and without a schedule,
  whose first step would move next to nothing.

  Returns:
    The largest differences of logits and loss, of dense parameters and of rows.

  Raises:
    Disagreement: If one of them is above its tolerance.
  """
  peer = import_peer()
  method = dataclasses.replace(
    step.method, config=dataclasses.replace(step.method.config, dropout_rate=0)
  )
  step = dataclasses.replace(
    step,
    method=method,
    optimizer=dataclasses.replace(
      step.optimizer, schedule="constant", warmup_steps=0
    ),
  )
  state = init_state(step)
  training = peer.Training(step, state, compiled=compiled)
  (task,) = method.config.tasks

  rows = method.read(state.tables, batch)
  predictions, _, reads = method.apply(
    state.params, state.tables, rows, batch, train=False
  )
  logits, slots = training.predict(peer.convert(batch, method))
  same = np.ones((batch.size,), bool)
  for name, read in reads.items():
    same &= same_slots(read["ids"], slots[name].reshape(read["ids"].shape))
  if 1 - same.mean() > MAX_TIES:
    raise Disagreement(
      f"{method.name}: other slots in {1 - same.mean():.1%} of the examples"
    )
  batch = batch.replace(example_mask=batch.example_mask & same)
  differences = {
    "output": float(np.abs(logits - predictions[task])[same].max())
  }

  state, scalars = jax.jit(
    functools.partial(train_state.train_step, config=step)
  )(state, batch)
  loss = training.step(peer.convert(batch, method))
  differences["output"] = max(
    differences["output"], abs(loss - float(scalars["loss"][0]))
  )
  params = training.params()
  differences["params"] = max(
    float(np.abs(params[optimizer_lib.path_name(path)] - value).max())
    for path, value in jax.tree_util.tree_leaves_with_path(state.params)
  )
  differences["rows"] = max(
    float(np.abs(training.tables[name].values.numpy() - values).max())
    for name, values in state.tables.items()
  )
  for what, most in TOLERANCES.items():
    found = differences[what]
    if not found <= most:
      raise Disagreement(
        f"{method.name}: recjax and PyTorch differ by {found:.1e} in {what}, "
        f"at most {most:.0e} is allowed"
      )
  return differences


def same_slots(ours, theirs) -> np.ndarray:
  """Whether both read the same slots, for each example."""
  order = [np.sort(np.asarray(slots), axis=-1) for slots in (ours, theirs)]
  return (order[0] == order[1]).all(axis=(0, 2))


def compare_compiled(steps: list[StepConfig], batch: Batch) -> str:
  """`compare` for `torch.compile`; says why if it cannot be made to work."""
  try:
    for step in steps:
      compare(step, batch, compiled=True)
  except Disagreement:
    raise
  except Exception as error:  # It needs a C++ compiler, among other things.
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
  return ""


class Race:
  """One model in all forms, each with a state of its own."""

  def __init__(self, step: StepConfig, batches: list[Batch], peers: list[str]):
    self.state = init_state(step)
    self.batches = jax.device_put(batches)
    self.step = jax.jit(
      functools.partial(train_state.train_step, config=step), donate_argnums=0
    )
    jaxpr = jax.make_jaxpr(self.step)(self.state, self.batches[0]).jaxpr
    self.products, self.operands = make_products(jaxpr)
    self.runners = {"recjax": self._step, "products": self._multiply}
    for name in peers:
      peer = import_peer()
      training = peer.Training(step, self.state, compiled=name != "torch")
      self.runners[name] = functools.partial(
        self._torch_step,
        training,
        [peer.convert(batch, step.method) for batch in batches],
      )
    self.clear()

  def clear(self) -> None:
    """Forgets what the warm-up took."""
    self.secs = {name: [] for name in self.runners}

  def run(self, turn: int) -> None:
    """Times a block of steps of each."""
    # The order turns, so that none always follows the same other.
    for name in list(self.runners)[:: 1 if turn % 2 else -1]:
      for i in range(_BLOCK):
        start = time.perf_counter()
        self.runners[name]((turn * _BLOCK + i) % _NUM_BATCHES)
        self.secs[name].append(time.perf_counter() - start)

  def summary(self) -> dict[str, Any]:
    """Median seconds of each, and how far its middle half is spread."""
    return {
      name: {
        "secs": statistics.median(self.secs[name]),
        "quartiles": np.quantile(self.secs[name], [0.25, 0.75]).tolist(),
      }
      for name in self.runners
    }

  def _step(self, i: int) -> None:
    self.state, scalars = jax.block_until_ready(
      self.step(self.state, self.batches[i])
    )
    _check_loss(float(scalars["loss"][0]))

  def _multiply(self, i: int) -> None:
    del i
    jax.block_until_ready(self.products(self.operands))

  def _torch_step(self, training, batches, i: int) -> None:
    _check_loss(training.step(batches[i]))


def make_products(jaxpr: core.Jaxpr):
  """A program of all matrix products of a step and nothing else.

  Returns:
    The compiled function and its argument: two random factors a product.
  """
  products = list(matrix_products(jaxpr))
  rng = np.random.default_rng(0)
  operands = [
    tuple(
      jnp.asarray(rng.standard_normal(v.aval.shape), v.aval.dtype)
      for v in eqn.invars
    )
    for eqn in products
  ]

  @jax.jit
  def multiply(operands):
    return [
      jax.lax.dot_general_p.bind(*pair, **eqn.params)
      for eqn, pair in zip(products, operands, strict=True)
    ]

  return multiply, operands


def matrix_products(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
  """The products of two matrices in a program.

  Weighted sums of vectors, and the outer products of their gradients, are none:
  they move memory.
  """
  for eqn in jaxpr.eqns:
    if eqn.primitive is jax.lax.dot_general_p:
      contracted, batched = eqn.params["dimension_numbers"]
      shapes = [v.aval.shape for v in eqn.invars]
      free = [
        np.delete(shape, [*axes, *batch_axes])
        for shape, axes, batch_axes in zip(
          shapes, contracted, batched, strict=True
        )
      ]
      summed = [shapes[0][axis] for axis in contracted[0]]
      if all(np.prod(sizes) > 1 for sizes in (*free, summed)):
        yield eqn
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if isinstance(inner, core.Jaxpr):
        yield from matrix_products(inner)


def report(result: dict[str, Any]) -> list[str]:
  """Prints one number of threads; returns the bars that were missed."""
  threads, misses = result["num_threads"], []
  print(f"{threads} thread{'s' * (threads > 1)}, ms a step (middle half)")
  columns = ("recjax", *BARS)
  print(f"{'':<12}" + "".join(f"{name:>22}" for name in columns) + "  products")
  models = result["models"]
  for name, times in models.items():
    line = f"{name:<12}"
    for column in columns:
      entry = times.get(column)
      line += f"{_cell(entry) if entry else '-':>22}"
    share = times["products"]["secs"] / times["recjax"]["secs"]
    print(line + f"{share:>10.0%}")
  for name, found in result["differences"].items():
    print(
      f"{name}: largest difference "
      + ", ".join(f"{v:.0e} in {k}" for k, v in found.items())
    )
    times = models[name]
    for other, bar in BARS.items():
      if other not in times:
        print(f"{name}: no {other}: {result['not_compiled']}")
        continue
      ratio = times[other]["secs"] / times["recjax"]["secs"]
      text = f"{name}: {ratio:.2f} times the speed of {other} (at least {bar})"
      misses += _judge(text, ratio >= bar, f"{threads}: {name}, {other}")
  if {"msn@256", "msn@1024"} <= set(models):
    secs = [models[f"msn@{n}"]["recjax"]["secs"] for n in (256, 1024)]
    growth = secs[1] / secs[0]
    text = f"1024 ** 2 slots over 256 ** 2: {growth:.2f} (at most {MAX_GROWTH})"
    misses += _judge(text, growth <= MAX_GROWTH, f"{threads}: growth")
  return misses


def _judge(text: str, passed: bool, miss: str) -> list[str]:
  print(f"{text}: {'pass' if passed else 'MISS'}")
  return [] if passed else [miss]


def _cell(entry: dict[str, Any]) -> str:
  low, high = (1e3 * secs for secs in entry["quartiles"])
  return f"{1e3 * entry['secs']:.1f} ({low:.1f} ... {high:.1f})"


def _check_loss(loss: float) -> None:
  if not np.isfinite(loss):
    raise RuntimeError(f"loss {loss}")


def _numbers(flag, *, least: int) -> list[int]:
  """The whole numbers of a list flag."""
  try:
    numbers = [int(word) for word in flag.value]
  except ValueError:
    numbers = []
  if not numbers or min(numbers) < least:
    raise UserError(
      f"--{flag.name} must be whole numbers of at least {least}, got "
      f"{','.join(flag.value)}; write for example --{flag.name}="
      + ",".join(flag.default)
    )
  return numbers


if __name__ == "__main__":
  door.run(main)
