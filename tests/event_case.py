"""Data with several sequences, and their layers in float64 NumPy.

The oracles work on the valid events of one example at a time, so they also
say what masks must do.
"""

import jax.numpy as jnp
import numpy as np

from recjax.batch import Batch
from recjax.schema import Feature, Label, Roles, Schema
from tests import oracles

SCHEMA = Schema(
  features=(
    Feature("user_id", "sparse"),
    Feature("item_id", "sparse"),
    Feature("author_id", "sparse"),
    Feature("tags", "sparse", multi=True, max_len=3),
    Feature(
      "watched",
      "sequence",
      vocabulary="item_id",
      max_len=6,
      time="watched_time",
      side={"watched_author": "author_id", "watched_hour": "hour"},
    ),
    Feature("liked", "sequence", vocabulary="item_id", max_len=4),
    Feature("hour", "sparse"),
    Feature("age", "dense"),
    Feature("content", "vector", dim=3),
  ),
  labels=(Label("click"), Label("like")),
  roles=Roles(user="user_id", item="item_id", group="user_id", time="row"),
  vocab_sizes={
    "user_id": 20,
    "item_id": 30,
    "author_id": 9,
    "tags": 5,
    "hour": 4,
  },
)
LENGTHS = {"watched": 6, "liked": 4, "tags": 3}


def make_batch(seed: int = 0, size: int = 6, cut: int = 0) -> Batch:
  """Random examples; the first has no event, the second all of them.

  With `cut` the arrays of `watched` are shorter than the schema allows.
  """
  rng = np.random.default_rng(seed)
  lengths = LENGTHS | ({"watched": cut} if cut else {})
  number = {name: rng.integers(0, n + 1, size) for name, n in lengths.items()}
  for name, n in lengths.items():
    number[name][:2] = 0, n
  ids, id_mask = {}, {}
  for feature in SCHEMA.id_features:
    high = SCHEMA.vocab_sizes[feature.vocab]
    if feature.is_list:
      owner = feature.name.partition("_")[0]
      mask = np.arange(lengths[owner]) < number[owner][:, None]
      ids[feature.name] = np.where(mask, rng.integers(0, high, mask.shape), 0)
      id_mask[feature.name] = jnp.asarray(mask)
    else:
      ids[feature.name] = rng.integers(0, high, size)
  age = np.sort(rng.exponential(1e5, ids["watched"].shape))[:, ::-1]
  labels = rng.integers(0, 2, (2, size)).astype(np.float32)
  valid = jnp.ones(size, bool)
  return Batch(
    dense=jnp.asarray(rng.normal(size=(size, 1)), jnp.float32),
    ids={k: jnp.asarray(v, jnp.int32) for k, v in ids.items()},
    id_mask=id_mask,
    vectors={"content": jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)},
    labels={"click": jnp.asarray(labels[0]), "like": jnp.asarray(labels[1])},
    label_mask={"click": valid, "like": valid},
    scenario=jnp.zeros(size, jnp.int32),
    groups={},
    example_mask=valid,
    event_age={
      "watched": jnp.where(id_mask["watched"], jnp.asarray(age), 0.0).astype(
        jnp.float32
      )
    },
  )


def embed_events(params, batch, rows, example):
  """Sequence -> vectors and ages of the events of one example."""
  found = {}
  for feature in SCHEMA.sequences:
    name = feature.name
    mask = np.asarray(batch.id_mask[name][example])
    ages = None
    if name in batch.event_age:
      ages = np.asarray(batch.event_age[name][example], np.float64)[mask]
    names = [name, *(side.name for side in SCHEMA.sides(feature))]
    vectors = []
    for i in range(mask.sum()):
      parts = [rows[column][example, i] for column in names]
      if ages is not None:
        gap = ages[i] - (ages[i + 1] if i + 1 < len(ages) else 0.0)
        times = np.log1p([ages[i], gap]) / 16
        parts.append(times)
        for time, slope, knots in zip(
          times, params[f"{name}_slope"], params[f"{name}_knots"], strict=True
        ):
          parts.append(np.maximum(time * slope + knots, 0))
      vector = dense(params[name], np.concatenate(parts))
      vectors.append(vector + params[f"{name}_position"][mask.sum() - 1 - i])
    dim = params[name]["bias"].shape[0]
    found[name] = np.array(vectors).reshape(-1, dim), ages
  return found


def transformer_layer(params, x, *, num_queries=0, is_causal=False):
  """The layer that normalises first; its last `num_queries` positions."""
  kept = x[-num_queries:] if num_queries else x
  if not len(x):
    return kept
  norm = layer_norm(params["attention_norm"], x)
  allowed = np.ones((len(kept), len(x)), bool)
  if is_causal:
    for i in range(len(kept)):
      allowed[i, len(x) - len(kept) + i + 1 :] = False
  query = norm[len(x) - len(kept) :]
  x = kept + attention(params["attention"], query, norm, allowed)
  return x + feed_forward(params["ffn"], layer_norm(params["ffn_norm"], x))


def attention(params, x, y, allowed=None):
  """One query and head at a time; zero before the projection without keys."""
  _, heads, head_dim = params["query"]["kernel"].shape
  found = np.zeros((len(x), heads, head_dim))
  for i in range(len(x)):
    seen = y if allowed is None else y[allowed[i]]
    for h in range(heads):
      query = x[i] @ params["query"]["kernel"][:, h]
      scores = [
        query @ (key @ params["key"]["kernel"][:, h]) / np.sqrt(head_dim)
        for key in seen
      ]
      if len(seen):
        weights = oracles.softmax(np.array(scores))
        found[i, h] = weights @ (seen @ params["value"]["kernel"][:, h])
  out = params["out"]
  return np.einsum("qhd,hde->qe", found, out["kernel"]) + out["bias"]


def feed_forward(params, x):
  """`W2 GELU(W1 x + b1) + b2`."""
  return dense(params["down"], oracles.gelu(dense(params["up"], x)))


def layer_norm(params, x):
  """With gain and bias."""
  return oracles.layer_norm(x, params["scale"], params["bias"])


def dense(params, x):
  """`x W + b`."""
  return x @ params["kernel"] + params["bias"]
