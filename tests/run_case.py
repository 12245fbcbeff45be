"""What the tests of runs share: a small table, a tiny recipe and a method."""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import parameterized

from recjax import config as config_lib
from recjax import losses, parallel, train, train_state
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax.checkpoint import Checkpoints
from recjax.data.pipeline import open_dataset
from recjax.layers.features import ConcatFeatures
from recjax.layers.heads import TaskHeads
from recjax.sparse.table import embedding_table
from recjax.writer import read_lines

SCHEMA = {
  "features": {
    "user": {"kind": "sparse"},
    "item": {"kind": "sparse"},
    "genres": {"kind": "sparse", "multi": True, "max_len": 3},
    "price": {"kind": "dense"},
  },
  "labels": {"click": "binary", "secs": {"kind": "real", "unit": "s"}},
  "roles": {"user": "user", "item": "item", "group": "user"},
  "split": {"by": "column", "column": "part"},
}
ROWS = {"train": 120, "valid": 70, "test": 71}
# 8 steps an epoch, the last one half full; evaluations leave a rest, too.
BATCH_SIZE, EVAL_BATCH_SIZE = 16, 32
# With the row of the unknown ones.
NUM_USERS = 13
# Programs that run a few times need no costly passes, and are kept.
COMPILER = {
  "jax_disable_most_optimizations": True,
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


@functools.cache
def shared_directory() -> pathlib.Path:
  """Holds the table and compiled programs while the tests of a file run."""
  keeper = tempfile.TemporaryDirectory(prefix="recjax_runs_")
  shared_directory.keeper = keeper
  return pathlib.Path(keeper.name)


@functools.cache
def data_config():
  """`config.data` of a small table in which `click` can be learned."""
  directory, rng = shared_directory(), np.random.default_rng(0)
  num_rows = sum(ROWS.values())
  user, item = (
    rng.integers(0, NUM_USERS - 1, num_rows),
    rng.integers(0, 15, num_rows),
  )
  genres = rng.integers(0, 6, (num_rows, 3))
  secs = rng.exponential(20.0, num_rows).round(3)
  columns = {
    "part": np.repeat(list(ROWS), list(ROWS.values())),
    "user": user,
    "item": item,
    "genres": [row[: i % 4] for i, row in enumerate(genres.tolist())],
    "price": rng.normal(size=num_rows),
    "click": ((user + item) % 3 == 0) ^ (rng.random(num_rows) < 0.1),
    "secs": np.where(rng.random(num_rows) < 0.2, np.nan, secs),
  }
  columns["click"] = columns["click"].astype(np.int32)
  pq.write_table(pa.table(columns), directory / "log.parquet")
  (directory / "schema.json").write_text(json.dumps(SCHEMA))
  return {
    "name": "table",
    "path": str(directory / "log.parquet"),
    "schema": str(directory / "schema.json"),
    "cache_dir": str(directory / "cache"),
  }


def make_config(model_name="dlrm_mlp", **overrides):
  """A recipe of 12 steps; `train__log_every_steps=3` sets one key."""
  config = {
    "model_name": model_name,
    "seed": 3,
    "model": {"tasks": ["click"], "embed_dim": 4},
    "data": dict(data_config()),
    "optimizer": {"learning_rate": 0.02, "sparse": {"learning_rate": 0.1}},
    "train": {
      "batch_size": BATCH_SIZE,
      "eval_batch_size": EVAL_BATCH_SIZE,
      "num_train_steps": 12,
      "eval_every_steps": 4,
    },
    "parallel": {},
  }
  if model_name == "dlrm_mlp":
    config["model"] |= {"mlp_dims": [8], "dropout_rate": 0.3}
  for key, value in overrides.items():
    *blocks, name = key.split("__")
    inner = config
    for block in blocks:
      inner = inner[block]
    inner[name] = value
  return config


@dataclasses.dataclass(frozen=True)
class Config:
  """Config of the method of `make_method`."""

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 4


class Model(nn.Module):
  """A hidden layer, and the sums that evaluations add."""

  config: Config
  schema: method_lib.Schema

  @nn.compact
  def __call__(self, batch, rows, *, train):
    x = ConcatFeatures(self.schema, name="inputs")(batch, rows["embedding"])
    x = nn.relu(nn.Dense(4, name="hidden")(x))
    x = nn.Dropout(0.3, deterministic=not train)(x)
    predictions = TaskHeads(self.config.tasks, name="heads")(x, train=train)
    valid = batch.example_mask
    users = jnp.where(valid, batch.ids["user"], -1)
    hits = users[:, None] == jnp.arange(NUM_USERS)[None]
    counters = {
      "memory": {"hits": hits.sum(0)},
      "num_examples": valid.sum(),
    }
    return predictions, {"counters": counters}


def make_method(**parts):
  """A method file as a namespace; `parts` replace or add entries."""

  def loss_fn(predictions, aux, batch, config):
    del aux, config
    return losses.task_losses(predictions, batch)

  def tables(config, schema):
    return {"embedding": embedding_table(schema, config.embed_dim)}

  def diagnostics(counters):
    return {"examples": float(counters["num_examples"])}

  return types.SimpleNamespace(
    **{
      "Config": Config,
      "Model": Model,
      "loss_fn": loss_fn,
      "tables": tables,
      "diagnostics": diagnostics,
      **parts,
    }
  )


class RunTestCase(parameterized.TestCase):
  """Runs in folders of their own, with programs compiled once."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    options = COMPILER | {
      "jax_compilation_cache_dir": str(shared_directory() / "programs")
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
      jax.config.update(name, value)
    cls.addClassCleanup(
      lambda: [jax.config.update(name, v) for name, v in before.items()]
    )

  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def use_method(self, module):
    """Lets any `model_name` stand for this module."""
    self.enter_context(
      mock.patch.object(method_lib, "find_module", lambda name: module)
    )

  def run_once(self, config, workdir="run"):
    """The result of a run (of its end, if it was cut off)."""
    return train.train_and_evaluate(config, str(self.directory / workdir))

  def run_until(self, step, config, workdir="run"):
    """Sends SIGTERM to this very process after `step`."""
    update = train.Progress.update

    def update_and_stop(progress, now, **kwargs):
      update(progress, now, **kwargs)
      if now == step:
        os.kill(os.getpid(), 15)

    with mock.patch.object(train.Progress, "update", update_and_stop):
      self.assertIsNone(self.run_once(config, workdir))

  def steps_kept(self, workdir="run"):
    """Steps whose checkpoints are there."""
    folder = self.directory / workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

  def lines(self, workdir="run"):
    """`metrics.jsonl` without what depends on the clock."""
    lines = read_lines(self.directory / workdir / "metrics.jsonl")
    for line in lines:
      line.pop("train/examples_per_sec", None)
    return lines

  def state(self, step, config, workdir="run", stage=0):
    """The state of a checkpoint on the host."""
    columns = open_dataset(config["data"])
    method = method_lib.load(
      config["model_name"], config["model"], columns.schema
    )
    step_config = train_state.StepConfig(
      method=method,
      stage=method.stages[stage],
      optimizer=config_lib.build(
        optimizer_lib.Config, config["optimizer"], "config.optimizer"
      ),
      num_steps=1,
    )
    placement = parallel.place(parallel.Config())
    shapes = jax.eval_shape(
      lambda: train_state.init_state(jax.random.key(0), step_config)
    )
    checkpoints = Checkpoints(self.directory / workdir, keep=9)
    target = placement.restore_target(shapes)
    state = jax.device_get(checkpoints.restore(step, target))
    checkpoints.close()
    return state


def start_child(config, workdir, setup=""):
  """Starts a run in another process, with its log beside the workdir.

  `setup` are lines to execute before it.
  """
  options = COMPILER | {
    "jax_compilation_cache_dir": str(shared_directory() / "programs")
  }
  script = f"""
import json, os, time
import tests.conftest
import jax
for name, value in {options!r}.items():
  jax.config.update(name, value)
from recjax import train
{setup}
train.train_and_evaluate(json.loads({json.dumps(config)!r}), {str(workdir)!r})
"""
  with pathlib.Path(f"{workdir}.log").open("w") as log:
    return subprocess.Popen(
      [sys.executable, "-c", script],
      cwd=pathlib.Path(__file__).parents[1],
      stderr=log,
    )


def changed(config, **overrides):
  """A copy of a recipe with top-level blocks updated."""
  config = copy.deepcopy(config)
  for block, values in overrides.items():
    config[block] |= values
  return config
