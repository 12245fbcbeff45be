r"""Measures what a training step pays for the size of its embedding tables.

    python -m experiments.bench_sparse [--num_rows=100000,10000000]

Trains MSN (one memory of 256 x 256 slots, batches of 512) with two embedding
tables 64 wide, one for users and one for items, each of the given number of
rows. Steps of both sizes run in turns in one process, so that a busy machine
slows both. Prints the shortest and the median time of each and, in the last
line, the same as JSON. Exits with code 1 if the shortest step of the larger
tables takes more than 1.5 times that of the smaller ones: a step must cost
what it touches, not what a table holds. Needs about 6 GB of memory.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import bench_data, door
from recjax import optimizer as optimizer_lib
from recjax import train_state
from recjax.errors import UserError
from recjax.layers.product_key_memory import MemoryConfig
from recjax.method import Method
from recjax.models import msn
from recjax.schema import Schema
from recjax.sparse.table import ROW_MULTIPLE, Table

_NUM_ROWS = flags.DEFINE_list(
  "num_rows", ["100000", "10000000"], "Rows of each table: smaller, larger."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "Examples a step.")
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed steps of each size.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters and batches.")

MAX_RATIO = 1.5
_NUM_BATCHES = 8


def main(argv) -> None:
  """Runs the benchmark."""
  del argv
  sizes = [int(size) for size in _NUM_ROWS.value]
  if len(sizes) != 2 or not 0 < sizes[0] < sizes[1]:
    raise UserError(
      f"--num_rows must be two rising numbers, got {_NUM_ROWS.value}; write "
      "for example --num_rows=100000,10000000"
    )
  trainings = [
    Training(size, _BATCH_SIZE.value, _SEED.value, _REPEATS.value)
    for size in sizes
  ]
  for training in trainings:
    training.check()
  times = {size: [] for size in sizes}
  for i in range(_REPEATS.value):
    # The order turns, so that neither size always follows the other.
    for training in trainings[:: 1 if i % 2 else -1]:
      times[training.num_rows].append(training.timed_step())
  fastest = [min(times[size]) for size in sizes]
  ratio = fastest[1] / fastest[0]
  print(f"{'rows':>12}{'min ms':>10}{'median ms':>12}")
  for size in sizes:
    median = statistics.median(times[size])
    print(f"{size:>12,}{1e3 * min(times[size]):>10.1f}{1e3 * median:>12.1f}")
  print(f"ratio of the minima: {ratio:.2f} (at most {MAX_RATIO})")
  print(
    json.dumps(
      {
        "num_rows": sizes,
        "batch_size": _BATCH_SIZE.value,
        "repeats": _REPEATS.value,
        "min_secs": fastest,
        "median_secs": [statistics.median(times[size]) for size in sizes],
        "ratio": ratio,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
      }
    )
  )
  sys.exit(int(ratio > MAX_RATIO))


class Training:
  """A compiled step, its state and a few batches on the device."""

  def __init__(self, num_rows: int, batch_size: int, seed: int, num_steps: int):
    self.num_rows = num_rows
    method = make_method(num_rows)
    config = train_state.StepConfig(
      method, method.stages[0], optimizer_lib.Config(), num_steps
    )
    rng = np.random.default_rng(seed)
    self.batches = [
      bench_data.make_batch(rng, method.schema, batch_size)
      for _ in range(_NUM_BATCHES)
    ]
    self.method, self.count = method, 0
    self.state = initial_state(config, seed)
    self.step = jax.jit(
      functools.partial(train_state.train_step, config=config),
      donate_argnums=0,
    )

  def check(self) -> None:
    """Takes one step and raises unless exactly the rows read have moved."""
    batch = self.batches[0]
    probes = {}
    for name, ids in self.method.ids(batch).items():
      # Rows that the batch reads, and as many that it does not read.
      read = np.unique(np.asarray(ids))
      other = np.setdiff1d((read + 1) % self.num_rows, read)
      probes[name] = (jnp.asarray(read), jnp.asarray(other))
    before = self._probe(probes)
    self.state, scalars = self.step(self.state, batch)
    after = self._probe(probes)
    loss = float(scalars["loss"][0])
    if not np.isfinite(loss) or int(self.state.num_skipped):
      raise RuntimeError(f"the first step failed: loss {loss}")
    for name in probes:
      read, other = (
        (old != new).any(axis=-1)
        for old, new in zip(before[name], after[name], strict=True)
      )
      if not read.all() or other.any():
        raise RuntimeError(
          f"table {name!r}: {int((~read).sum())} rows that were read stayed, "
          f"{int(other.sum())} others moved"
        )

  def timed_step(self) -> float:
    """Seconds of one step."""
    self.count += 1
    batch = self.batches[self.count % _NUM_BATCHES]
    start = time.perf_counter()
    self.state, scalars = jax.block_until_ready(self.step(self.state, batch))
    secs = time.perf_counter() - start
    if not np.isfinite(float(scalars["loss"][0])):
      raise RuntimeError(f"loss {scalars['loss'][0]} in step {self.count}")
    return secs

  def _probe(self, probes):
    tables = self.state.tables
    return {
      name: [np.asarray(tables[name][ids]) for ids in parts]
      for name, parts in probes.items()
    }


class Model(msn.Model):
  """MSN over the rows of two embedding tables."""

  def __call__(self, batch, rows, *, train):
    rows = {"embedding": rows["users"] | rows["items"]}
    return super().__call__(batch, rows, train=train)


def tables(config: msn.Config, schema: Schema) -> dict[str, Table]:
  """One table for user ids, one for item ids, and the memory's values."""
  declared = msn.tables(config, schema)
  both = declared.pop("embedding")
  for name, features in (
    ("users", ("user_id",)),
    ("items", ("item_id", "history")),
  ):
    declared[name] = dataclasses.replace(
      both,
      num_rows=schema.vocab_sizes[schema.feature(features[0]).vocab],
      first_row=dict.fromkeys(features, 0),
    )
  return declared


def make_method(num_rows: int) -> Method:
  """MSN with two tables of `num_rows` rows."""
  schema = bench_data.make_schema(num_rows)
  config = msn.Config(
    embed_dim=64,
    memory=MemoryConfig(num_keys=256),
    memory_layers=(0,),
  )
  module = types.SimpleNamespace(
    Model=Model, tables=tables, loss_fn=msn.loss_fn
  )
  return Method("msn_two_tables", module, config, schema)


def initial_state(
  config: train_state.StepConfig, seed: int
) -> train_state.TrainState:
  """A fresh state whose tables repeat the rows of small ones.

  To draw 1.3 billion normal numbers takes a minute and thrice the tables'
  memory, and a step takes no notice of what the rows hold.
  """
  init = functools.partial(train_state.init_state, config=config)
  full = jax.eval_shape(init, jax.random.key(seed))
  small_config = dataclasses.replace(config, method=make_method(ROW_MULTIPLE))
  small = jax.jit(
    functools.partial(train_state.init_state, config=small_config)
  )(jax.random.key(seed))

  @functools.partial(jax.jit, static_argnums=1)
  def repeat(x, num_rows):
    repeats = num_rows // x.shape[0]
    return jnp.tile(x, (repeats, *(1,) * (x.ndim - 1)))

  grow = lambda x, like: repeat(x, like.shape[0])  # noqa: E731
  return small.replace(
    tables=jax.tree.map(grow, small.tables, full.tables),
    table_states=jax.tree.map(grow, small.table_states, full.table_states),
  )


if __name__ == "__main__":
  door.run(main)
