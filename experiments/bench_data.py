"""Random examples for benchmarks."""

import jax
import numpy as np

from recjax.batch import Batch
from recjax.schema import Feature, Label, Schema

_HISTORY = 20


def make_schema(num_rows: int) -> Schema:
  """Users and items of `num_rows` ids each, and a history of items."""
  return Schema(
    features=(
      Feature("user_id", "sparse"),
      Feature("item_id", "sparse"),
      Feature("history", "sequence", vocabulary="item_id", max_len=_HISTORY),
      Feature("age", "dense"),
    ),
    labels=(Label("click"),),
    vocab_sizes={"user_id": num_rows, "item_id": num_rows},
  )


def make_batch(rng: np.random.Generator, schema: Schema, size: int) -> Batch:
  """Examples whose ids are spread evenly over the tables, as caches hate it."""
  num_rows = schema.vocab_sizes["item_id"]
  shapes = {"user_id": (size,), "item_id": (size,), "history": (size, _HISTORY)}
  every = np.ones((size,), bool)
  batch = Batch(
    dense=rng.standard_normal((size, 1), np.float32),
    ids={
      name: rng.integers(1, num_rows, shape).astype(np.int32)
      for name, shape in shapes.items()
    },
    id_mask={"history": np.ones(shapes["history"], bool)},
    vectors={},
    labels={"click": (rng.random(size) < 0.3).astype(np.float32)},
    label_mask={"click": every},
    scenario=np.zeros((size,), np.int32),
    groups={},
    example_mask=every,
  )
  return jax.device_put(batch)
