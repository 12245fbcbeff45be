r"""Times scoring a user once against scoring every pair of user and candidate.

    python -m experiments.bench_serving [--models=hyformer,din] \
        [--candidates=16,128,1024] [--events=64,512,4096]

One request is one user with a history and many candidates. For every model and
size: the scores of `serve.Ranker` are compared with those of the model on every
pair, and then both are timed in turns. `encode + score` is a request of a user
that nobody has seen, `score` one whose state is kept; `naive` runs the pairs in
chunks, so that histories of 4,096 events fit. Prints p50 and p99 in
milliseconds and the ratio of the medians, and in the last line the same as
JSON. Weights are random: time does not depend on them.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import door
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import serve, train_state
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.schema import Feature, Label, Roles, Schema

_MODELS = flags.DEFINE_list(
  "models", ["hyformer", "longer", "din", "rankmixer"], "Methods to time."
)
_CANDIDATES = flags.DEFINE_list("candidates", ["16", "128", "1024"], "Numbers.")
_EVENTS = flags.DEFINE_list("events", ["64", "512", "4096"], "Lengths.")
_REPEATS = flags.DEFINE_integer(
  "repeats", 30, "Timed requests of each kind.", lower_bound=2
)
_SECONDS = flags.DEFINE_float(
  "seconds", 20.0, "Ends the turns of a case early.", lower_bound=0.1
)

CANDIDATE = ("item_id", "author_id", "category", "price")
# Pairs that the naive path computes at a time, at most so many events.
_CHUNK_EVENTS = 1 << 17
_TOLERANCE = 1e-5
_SIZES = {"user_id": 10_000, "item_id": 50_000, "author_id": 5_000}
_SIZES |= {"category": 100, "city": 500, "device": 20}


def main(argv) -> None:
  """Runs the benchmark."""
  del argv
  candidates, events = _numbers(_CANDIDATES), _numbers(_EVENTS)
  print(
    f"{'model':<24}{'events':>7}{'candidates':>11}{'naive p50':>11}"
    f"{'p99':>9}{'enc+score':>11}{'p99':>9}{'score':>9}{'p99':>9}"
    f"{'ratio':>8}{'cached':>8}"
  )
  rows = []
  for model in _MODELS.value:
    for num_events in events:
      for num_candidates in candidates:
        row = measure(model, num_events, num_candidates)
        rows.append(row)
        print(
          f"{model:<24}{num_events:>7}{num_candidates:>11}"
          f"{row['naive']['p50']:>11.2f}{row['naive']['p99']:>9.2f}"
          f"{row['encode_and_score']['p50']:>11.2f}"
          f"{row['encode_and_score']['p99']:>9.2f}"
          f"{row['score']['p50']:>9.2f}{row['score']['p99']:>9.2f}"
          f"{row['ratio']:>8.1f}{row['cached_ratio']:>8.1f}",
          flush=True,
        )
  print(json.dumps({"rows": rows, "jax": jax.__version__}))


def make_schema(num_events: int) -> Schema:
  """One user with a history of items, and what is known of a candidate."""
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in _SIZES),
      Feature("history", "sequence", vocabulary="item_id", max_len=num_events),
      Feature("age", "dense"),
      Feature("price", "dense"),
    ),
    labels=(Label("click"),),
    roles=Roles(user="user_id", item="item_id"),
    vocab_sizes=_SIZES,
  )


def make_batch(schema: Schema, size: int, rng: np.random.Generator) -> Batch:
  """Random examples with full histories."""
  num_events = schema.feature("history").max_len
  ids = {
    name: jnp.asarray(rng.integers(1, high, size), jnp.int32)
    for name, high in _SIZES.items()
  }
  history = rng.integers(1, _SIZES["item_id"], (size, num_events))
  ids["history"] = jnp.asarray(history, jnp.int32)
  return Batch(
    dense=jnp.asarray(rng.normal(size=(size, 2)), jnp.float32),
    ids=ids,
    id_mask={"history": jnp.ones((size, num_events), bool)},
    vectors={},
    labels={},
    label_mask={},
    scenario=jnp.zeros(size, jnp.int32),
    groups={},
    example_mask=jnp.ones(size, bool),
  )


def make_method(model: str, schema: Schema) -> method_lib.Method:
  """The method `model` at the sizes of its `base` recipe's defaults."""
  return method_lib.load(model, {"tasks": ("click",)}, schema)


def measure(model: str, num_events: int, num_candidates: int) -> dict[str, Any]:
  """Compares the scores of one case, then times it; milliseconds."""
  schema = make_schema(num_events)
  method = make_method(model, schema)
  step = train_state.StepConfig(
    method, method.stages[0], optimizer_lib.Config(), num_steps=1
  )
  state = jax.jit(lambda rng: train_state.init_state(rng, step))(
    jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  user, candidates = (
    make_batch(schema, 1, rng),
    make_batch(schema, num_candidates, rng),
  )
  ranker = serve.Ranker(method, CANDIDATE)
  user_state = ranker.encode_user(state, user)
  naive = make_naive(method, state, user, candidates)
  sides = {
    "naive": naive,
    "encode_and_score": lambda: ranker.score(
      state, ranker.encode_user(state, user), candidates
    )["click"],
    "score": lambda: ranker.score(state, user_state, candidates)["click"],
  }
  expected = np.asarray(naive())
  for name in ("encode_and_score", "score"):
    difference = np.abs(np.asarray(sides[name]()) - expected).max()
    if not difference <= _TOLERANCE * max(1.0, np.abs(expected).max()):
      raise RuntimeError(
        f"{model}, {num_events} events, {num_candidates} candidates: {name} is "
        f"{difference} off the scores of the pairs"
      )
  times = time_in_turns(sides)
  median = {name: values["p50"] for name, values in times.items()}
  return {
    "model": model,
    "events": num_events,
    "candidates": num_candidates,
    "user_state_bytes": user_state.nbytes,
    "ratio": median["naive"] / median["encode_and_score"],
    "cached_ratio": median["naive"] / median["score"],
    **times,
  }


def make_naive(
  method: method_lib.Method, state, user: Batch, candidates: Batch
) -> Callable[[], jax.Array]:
  """The model on every pair, in chunks that fit."""
  num = candidates.size
  num_events = user.ids["history"].shape[1]
  chunk = max(1, min(num, _CHUNK_EVENTS // num_events))
  repeat = lambda x: jnp.repeat(x, num, axis=0)  # noqa: E731
  ids = {
    name: candidates.ids[name] if name in CANDIDATE else repeat(value)
    for name, value in user.ids.items()
  }
  dense = jnp.stack([repeat(user.dense)[:, 0], candidates.dense[:, 1]], axis=1)
  pairs = candidates.replace(
    ids=ids, id_mask=jax.tree.map(repeat, user.id_mask), dense=dense
  )
  parts = [
    jax.tree.map(lambda x, s=start: x[s : s + chunk], pairs)
    for start in range(0, num, chunk)
  ]

  @jax.jit
  def predict(state, batch):
    rows = method.read(state.tables, batch)
    predictions, _, _ = method.apply(
      state.eval_params, state.tables, rows, batch, train=False
    )
    return predictions["click"]

  return lambda: jnp.concatenate([predict(state, part) for part in parts])


def time_in_turns(
  sides: dict[str, Callable[[], jax.Array]],
) -> dict[str, dict[str, float]]:
  """p50 and p99 of each side, in milliseconds; one of each at a time."""
  secs = {name: [] for name in sides}
  for function in sides.values():
    jax.block_until_ready(function())
  end = time.perf_counter() + _SECONDS.value
  for i in range(_REPEATS.value):
    for name, function in sides.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      secs[name].append(time.perf_counter() - start)
    if i and time.perf_counter() > end:
      break
  return {
    name: {
      "p50": 1e3 * float(np.percentile(values, 50)),
      "p99": 1e3 * float(np.percentile(values, 99)),
      "requests": len(values),
    }
    for name, values in secs.items()
  }


def _numbers(flag: flags.FlagHolder) -> list[int]:
  try:
    numbers = [int(text) for text in flag.value]
  except ValueError:
    numbers = []
  if not numbers or min(numbers) < 1:
    raise UserError(
      f"--{flag.name} must be whole numbers of at least 1, got "
      f"{','.join(flag.value)!r}"
    )
  return numbers


if __name__ == "__main__":
  door.run(main)
