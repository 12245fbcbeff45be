"""A small schema with feedback lists, and data, for tests of cold starts."""

import jax.numpy as jnp
import numpy as np

from recjax.batch import Batch
from recjax.data.columns import Block, ColumnWriter
from recjax.schema import Feature, Label, Roles, Schema

NUM_USERS, NUM_ITEMS, MAX_LEN = 30, 20, 4
SCHEMA = Schema(
  features=(
    Feature("user_id", "sparse"),
    Feature("item_id", "sparse"),
    Feature("city", "sparse"),
    Feature("genre", "sparse"),
    Feature("item_positives", "sparse"),
    Feature("positive_history", "sequence", vocabulary="item_id", max_len=5),
    Feature("pinnacle_users", "sequence", vocabulary="user_id", max_len=4),
    Feature("negative_users", "sequence", vocabulary="user_id", max_len=3),
    Feature("age", "dense"),
  ),
  labels=(Label("click"),),
  roles=Roles(user="user_id", item="item_id", group="user_id"),
  vocab_sizes={
    "user_id": NUM_USERS,
    "item_id": NUM_ITEMS,
    "city": 4,
    "genre": 5,
    "item_positives": 6,
  },
)
TOWERS = {
  "user_features": ["city", "age"],
  "item_features": ["genre"],
  "num_blocks": 1,
  "num_heads": 2,
}


def draw(seed: int, size: int):
  """Columns of random rows; users and items of unlike parity click, mostly."""
  rng = np.random.default_rng(seed)
  columns = {
    f.name: rng.integers(1, SCHEMA.vocab_sizes[f.vocab], size)
    for f in SCHEMA.id_features
    if not f.is_list
  }
  lists = {
    f.name: (
      rng.integers(1, SCHEMA.vocab_sizes[f.vocab], (size, f.max_len)),
      rng.integers(0, f.max_len + 1, size),
    )
    for f in SCHEMA.id_features
    if f.is_list
  }
  columns["city"] = 1 + columns["user_id"] % 3
  click = (columns["user_id"] + columns["item_id"]) % 2
  click = np.where(rng.random(size) < 0.2, 1 - click, click)
  return columns, lists, click.astype(np.float32), rng.normal(size=(size, 1))


def make_batch(seed: int = 0, size: int = 16) -> Batch:
  """Random examples."""
  columns, lists, click, dense = draw(seed, size)
  masks = {
    name: np.arange(ids.shape[1]) < length[:, None]
    for name, (ids, length) in lists.items()
  }
  ids = columns | {name: lists[name][0] * masks[name] for name in lists}
  everything = jnp.ones(size, bool)
  return Batch(
    dense=jnp.asarray(dense, jnp.float32),
    ids={k: jnp.asarray(v, jnp.int32) for k, v in ids.items()},
    id_mask={k: jnp.asarray(v) for k, v in masks.items()},
    vectors={},
    labels={"click": jnp.asarray(click)},
    label_mask={"click": everything},
    scenario=jnp.zeros(size, jnp.int32),
    groups={"group": jnp.asarray(columns["user_id"], jnp.int32)},
    example_mask=everything,
  )


def write_dataset(directory, num_rows: int = 600) -> None:
  """A prepared data set of `SCHEMA`, split 4:1:1."""
  writer = ColumnWriter(directory, SCHEMA)
  for number, (split, share) in enumerate(
    (("train", 4), ("valid", 1), ("test", 1))
  ):
    size = num_rows * share // 6
    columns, lists, click, dense = draw(number, size)
    slices = {}
    for name, (ids, length) in lists.items():
      start = writer.append_values(name, ids.reshape(-1).astype(np.int32))
      slices[name] = (start + np.arange(size) * ids.shape[1], length)
    writer.append(
      split,
      Block(
        dense=dense.astype(np.float32),
        ids=columns,
        lists=slices,
        vectors={},
        labels={"click": click},
        groups={"group": columns["user_id"]},
      ),
    )
  writer.finish(SCHEMA)
