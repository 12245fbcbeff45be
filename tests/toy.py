"""A small schema and random batches for tests of models and steps."""

import jax.numpy as jnp
import numpy as np

from recjax.batch import Batch
from recjax.data.columns import Block, ColumnWriter
from recjax.schema import TOKENS, Feature, Label, Roles, Schema

SCHEMA = Schema(
  features=(
    Feature("user_id", "sparse"),
    Feature("item_id", "sparse"),
    Feature("tags", "sparse", multi=True, max_len=3),
    Feature("history", "sequence", vocabulary="item_id", max_len=5),
    Feature("tab", "sparse"),
    Feature("age", "dense"),
    Feature("price", "dense"),
    Feature("content", "vector", dim=3),
    Feature("title", "text", max_len=4),
    Feature("query", "text", max_len=3),
  ),
  labels=(Label("click"), Label("like"), Label("play_time", "real", "s")),
  roles=Roles(
    user="user_id",
    item="item_id",
    group="user_id",
    query="user_id",
    scenario="tab",
  ),
  vocab_sizes={"user_id": 50, "item_id": 40, "tags": 7, "tab": 3, TOKENS: 20},
)
NUM_IDS = 50 + 40 + 7 + 3
# An item's title is the same wherever it appears.
TITLES = np.random.default_rng(7).integers(1, 20, (40, 4))


def make_batch(seed: int = 0, size: int = 16, num_padding: int = 0) -> Batch:
  """Random examples; `click` depends on user and item, so it can be learned."""
  rng = np.random.default_rng(seed)
  ids, id_mask = {}, {}
  valid = np.arange(size) < size - num_padding
  for feature in SCHEMA.id_features:
    high = SCHEMA.vocab_sizes[feature.vocab]
    if feature.is_list:
      shape = (size, feature.max_len)
      length = rng.integers(0, feature.max_len + 1, size)
      mask = (np.arange(feature.max_len) < length[:, None]) & valid[:, None]
      ids[feature.name] = np.where(mask, rng.integers(0, high, shape), 0)
      id_mask[feature.name] = jnp.asarray(mask)
    else:
      ids[feature.name] = rng.integers(0, high, size) * valid
  click = (ids["user_id"] + ids["item_id"]) % 2
  labels = {
    "click": click.astype(np.float32),
    "like": (rng.random(size) < 0.3).astype(np.float32),
    "play_time": rng.exponential(10, size).astype(np.float32),
  }
  return Batch(
    dense=jnp.asarray(rng.normal(size=(size, 2)), jnp.float32),
    ids={k: jnp.asarray(v, jnp.int32) for k, v in ids.items()},
    id_mask=id_mask,
    vectors={"content": jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)},
    labels={k: jnp.asarray(v) for k, v in labels.items()},
    label_mask={
      "click": jnp.asarray(valid),
      "like": jnp.asarray(valid & (rng.random(size) < 0.8)),
      "play_time": jnp.asarray(valid),
    },
    scenario=jnp.asarray(ids["tab"], jnp.int32),
    groups={
      "group": jnp.asarray(ids["user_id"], jnp.int32),
      "query": jnp.asarray(ids["user_id"], jnp.int32),
    },
    example_mask=jnp.asarray(valid),
    **_texts(seed, ids["item_id"], valid),
    real_labels=frozenset({"play_time"}),
  )


def _texts(seed, items, valid):
  """Titles of the items, the first of which are short, and random queries."""
  rng = np.random.default_rng([seed, 2])
  queries = rng.integers(1, 20, (len(items), 3))
  found = {"title": (TITLES[items], items % 5), "query": (queries, items % 3)}
  tokens, token_mask = {}, {}
  for name, (values, lengths) in found.items():
    mask = (np.arange(values.shape[1]) < lengths[:, None]) & valid[:, None]
    tokens[name] = jnp.asarray(values * mask, jnp.int32)
    token_mask[name] = jnp.asarray(mask)
  return {"tokens": tokens, "token_mask": token_mask}


def pair(user: Batch, candidates: Batch, names) -> Batch:
  """One example a candidate: its features `names`, the rest of `user`."""
  repeat = lambda x: jnp.repeat(x, candidates.size, axis=0)  # noqa: E731

  def merge(of_user, of_candidate):
    return {
      name: of_candidate[name] if name in names else repeat(value)
      for name, value in of_user.items()
    }

  dense = [feature.name in names for feature in SCHEMA.dense_features]
  return candidates.replace(
    dense=jnp.where(jnp.array(dense), candidates.dense, repeat(user.dense)),
    ids=merge(user.ids, candidates.ids),
    id_mask=merge(user.id_mask, candidates.id_mask),
    vectors=merge(user.vectors, candidates.vectors),
    tokens=merge(user.tokens, candidates.tokens),
    token_mask=merge(user.token_mask, candidates.token_mask),
    scenario=repeat(user.scenario),
  )


def write_dataset(directory, num_rows: int = 600, seed: int = 0):
  """A prepared data set of `SCHEMA` on disk, split 4:1:1."""
  writer = ColumnWriter(directory, SCHEMA)
  rng = np.random.default_rng(seed)
  start = {
    name: writer.append_values(
      name, rng.integers(0, size, 1000).astype(np.int32)
    )
    for name, size in (("tags", 7), ("history", 40))
  }
  more = np.random.default_rng([seed, 2])
  start |= {
    name: writer.append_values(name, more.integers(1, 20, 1000))
    for name in ("title", "query")
  }
  for split, share in (("train", 4), ("valid", 1), ("test", 1)):
    n = num_rows * share // 6
    batch = make_batch(int(rng.integers(1 << 30)), n)
    writer.append(
      split,
      Block(
        dense=np.asarray(batch.dense),
        ids={
          f.name: np.asarray(batch.ids[f.name])
          for f in SCHEMA.id_features
          if not f.is_list
        },
        lists={
          name: (
            first + rng.integers(0, 900, n),
            rng.integers(0, 6, n).astype(np.int32),
          )
          for name, first in start.items()
        },
        vectors={k: np.asarray(v) for k, v in batch.vectors.items()},
        labels={
          k: np.where(batch.label_mask[k], v, np.nan).astype(np.float32)
          for k, v in batch.labels.items()
        },
        groups={k: np.asarray(v) for k, v in batch.groups.items()},
      ),
    )
  writer.finish(SCHEMA)
