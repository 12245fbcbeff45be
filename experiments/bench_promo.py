"""Measures what PROMO's prompts cost: a training step, and a new item.

    python -m experiments.bench_promo [--batch_size=512]

Times a step of PROMO's third stage and a step of the two towers that it stands
on, in turns in one process, and prints both, their ratio (the median over the
pairs) and how many new items a second are scored for one user from their
feedback lists alone: that needs no training. The towers' step trains the
towers with the history's encoder frozen, as PROMO's does. Exits with code 1 if
the ratio is above 1.5. Random ids; tables of 100,000 users and items.
"""

import functools
import json
import statistics
import sys
import time

import jax
import numpy as np
from absl import flags

from experiments import door
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import serve, train_state
from recjax.batch import Batch
from recjax.method import empty_batch
from recjax.schema import Feature, Label, Roles, Schema

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "Examples a step.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed steps of each.")
_NUM_ROWS = flags.DEFINE_integer("num_rows", 100_000, "Users, and items.")

MAX_RATIO = 1.5
LISTS = {
  "positive_history": ("item_id", 50),
  "pinnacle_users": ("user_id", 10),
  "negative_users": ("user_id", 10),
}
SINGLE = ("user_id", "item_id", "profile", "genre", "item_positives")
CANDIDATE = ("item_id", "genre", "item_positives", *list(LISTS)[1:])


def main(argv) -> None:
  """Runs the benchmark."""
  del argv
  schema = make_schema(_NUM_ROWS.value)
  batch = make_batch(schema, _BATCH_SIZE.value)
  steps = [Step(name, schema, batch) for name in ("two_towers", "promo")]
  for i in range(_REPEATS.value + 1):
    # The order turns, so that none always follows the other.
    for step in steps[:: 1 if i % 2 else -1]:
      step.run()
  towers, promo = (step.secs[1:] for step in steps)
  ratio = statistics.median(b / a for a, b in zip(towers, promo, strict=True))
  items_per_sec = measure_serving(steps[1], batch)
  print(f"two towers {1e3 * statistics.median(towers):.2f} ms a step")
  print(f"PROMO      {1e3 * statistics.median(promo):.2f} ms a step")
  print(f"ratio      {ratio:.2f}")
  print(f"new items  {items_per_sec:,.0f} a second")
  print(
    json.dumps(
      {
        "two_towers_secs": statistics.median(towers),
        "promo_secs": statistics.median(promo),
        "ratio": ratio,
        "new_items_per_sec": items_per_sec,
        "batch_size": _BATCH_SIZE.value,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
      }
    )
  )
  sys.exit(int(ratio > MAX_RATIO))


class Step:
  """The last stage of a method on one batch."""

  def __init__(self, name: str, schema: Schema, batch: Batch):
    towers = {"user_features": ("profile",), "item_features": ("genre",)}
    self.method = method_lib.load(name, {"towers": towers}, schema)
    config = train_state.StepConfig(
      self.method,
      self.method.stages[-1],
      optimizer_lib.Config(),
      num_steps=_REPEATS.value + 1,
    )
    init = functools.partial(train_state.init_state, config=config)
    self.batch = batch
    self.state = jax.jit(init)(jax.random.key(0))
    self.step = jax.jit(
      functools.partial(train_state.train_step, config=config),
      donate_argnums=0,
    )
    self.secs = []

  def run(self) -> None:
    """Times one step; the first compiles."""
    start = time.perf_counter()
    self.state, scalars = jax.block_until_ready(
      self.step(self.state, self.batch)
    )
    self.secs.append(time.perf_counter() - start)
    if not np.isfinite(float(scalars["loss"][0])):
      raise RuntimeError(f"loss {scalars['loss'][0]}")


def measure_serving(step: Step, batch: Batch) -> float:
  """Candidates a second; row 0 stands for items that training never saw."""
  ranker = serve.Ranker(step.method, CANDIDATE)
  user = ranker.encode_user(step.state, jax.tree.map(lambda x: x[:1], batch))
  unseen = batch.ids | {"item_id": np.zeros_like(batch.ids["item_id"])}
  candidates, secs = batch.replace(ids=unseen), []
  for _ in range(_REPEATS.value + 1):
    start = time.perf_counter()
    jax.block_until_ready(ranker.score(step.state, user, candidates))
    secs.append(time.perf_counter() - start)
  return batch.size / statistics.median(secs[1:])


def make_schema(num_rows: int) -> Schema:
  """Users and items with histories and feedback lists, of the usual lengths."""
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in SINGLE),
      *(
        Feature(name, "sequence", vocabulary=vocabulary, max_len=max_len)
        for name, (vocabulary, max_len) in LISTS.items()
      ),
    ),
    labels=(Label("click"),),
    roles=Roles(user="user_id", item="item_id"),
    vocab_sizes={
      "user_id": num_rows,
      "item_id": num_rows,
      "profile": 10,
      "genre": 20,
      "item_positives": 6,
    },
  )


def make_batch(schema: Schema, size: int) -> Batch:
  """Random examples; half of the places in a list are filled."""
  rng = np.random.default_rng(0)
  batch = empty_batch(schema, ("click",), size)
  ids, masks = {}, {}
  for feature in schema.id_features:
    num = schema.vocab_sizes[feature.vocab]
    values = rng.integers(1, num, batch.ids[feature.name].shape)
    if feature.is_list:
      masks[feature.name] = np.arange(feature.max_len) < rng.integers(
        0, feature.max_len + 1, (size, 1)
      )
      values *= masks[feature.name]
    ids[feature.name] = values.astype(np.int32)
  return batch.replace(
    ids=ids,
    id_mask=masks,
    labels={"click": rng.integers(0, 2, size).astype(np.float32)},
    label_mask={"click": np.ones(size, bool)},
    example_mask=np.ones(size, bool),
  )


if __name__ == "__main__":
  door.run(main)
