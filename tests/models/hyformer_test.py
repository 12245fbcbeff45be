"""HyFormer's whole forward pass, recomputed in float64 NumPy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.errors import UserError
from recjax.layers import events as events_lib
from recjax.layers.per_token import token_mixing
from tests import event_case, oracles
from tests.event_case import SCHEMA, dense, layer_norm

TINY = {
  "tasks": ["click"],
  "embed_dim": 4,
  "num_tokens": 4,
  "token_dim": 8,
  "num_layers": 2,
  "num_heads": 2,
  "recent_len": 3,
}


def load(**overrides):
  return method_lib.load("hyformer", TINY | overrides, SCHEMA)


def compiled(method):
  def forward(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[0]["click"]

  return jax.jit(forward)


def split_rows(method, tables, batch):
  return method._split(method.read(tables, batch), batch)


def oracle(method, params, tables, batch):
  """Logits by the equations."""
  params, tables = oracles.to_float64((params, tables))
  table = method.tables["embedding"]
  rows = oracles.feature_rows(table, tables["embedding"], batch)
  plain = events_lib.without_sequences(SCHEMA)
  inputs = oracles.concat_features(plain, batch, rows)
  config = method.config
  num_features = config.num_tokens - sum(config.queries(SCHEMA).values())
  tokens = oracles.feature_tokens(params["tokens"], inputs, num_features)
  if not config.paper_literal:
    tokens = layer_norm(params["token_norm"], tokens)
  logits = [
    _example(config, params, batch, rows, tokens[:, b], b)
    for b in range(batch.size)
  ]
  return np.array(logits)


def _example(config, params, batch, rows, features, b):
  events = event_case.embed_events(params["events"], batch, rows, b)
  if config.merge_sequences:
    events = _merge(params["kinds"], events)
  h = {name: vectors for name, (vectors, _) in events.items()}
  names = [n for n, k in config.queries(SCHEMA).items() for _ in range(k)]
  x = np.concatenate(
    [
      _queries(config, params["generate"], rows, features, h, names, b),
      features,
    ]
  )
  for layer in range(config.num_layers):
    if config.reinject_features:
      x[len(names) :] = features
    for name in h:
      h[name] = _encode(config, params, name, layer, h[name])
    decoded = x.copy()
    for i, name in enumerate(names):
      part = params[f"decoders_{name}_{layer}"]
      query, keys = x[i : i + 1], h[name]
      if not config.paper_literal:
        query = layer_norm(part["query_norm"], query)
        keys = layer_norm(part["event_norm"], keys) if len(keys) else keys
      found = event_case.attention(part["attention"], query, keys)[0]
      decoded[i] = found + (x[i] if config.decode_residual else 0)
    x = _boost(config, params[f"boosters_{layer}"], decoded)
  head = {
    "mean": lambda: x.mean(0),
    "queries": lambda: x[: len(names)].ravel(),
    "queries_and_mean": lambda: np.concatenate(
      [x[: len(names)].ravel(), x[len(names) :].mean(0)]
    ),
  }[config.head_input]()
  return dense(params["heads"]["click"], head)[0]


def _merge(kinds, events):
  every = []
  for i, (vectors, _) in enumerate(events.values()):
    for k, vector in enumerate(vectors):
      # Not every sequence has times: by what came after.
      every.append((len(vectors) - k, vector + kinds[i]))
  every.sort(key=lambda event: -event[0])
  return {"merged": (np.array([v for _, v in every]).reshape(-1, 8), None)}


def _queries(config, params, rows, features, h, names, b):
  queries = []
  for i, name in enumerate(names):
    parts = list(features)
    if config.query_input == "target":
      parts = [rows["item_id"][b], rows["author_id"][b]]
    if config.query_input == "all":
      for other, vectors in h.items():
        if other == name or config.pooled == "all":
          mean = vectors.mean(0) if len(vectors) else np.zeros(8)
          parts.append(mean)
    x = np.concatenate(parts)
    if not config.paper_literal:
      x = layer_norm(params["input_norm"], x)
    x = x @ params["up"]["kernel"][i] + params["up"]["bias"][i, 0]
    x = x * oracles.sigmoid(x)
    x = x @ params["down"]["kernel"][i] + params["down"]["bias"][i, 0]
    if not config.paper_literal:
      x = layer_norm(params["output_norm"], x)
    queries.append(x)
  return np.array(queries)


def _encode(config, params, name, layer, h):
  params = params[f"encoders_{name}_{layer}"]
  if config.encoder == "swiglu":
    norm = layer_norm(params["norm"], h) if len(h) else h
    gate = dense(params["gate"], norm)
    hidden = gate * oracles.sigmoid(gate) * dense(params["up"], norm)
    return h + dense(params["down"], hidden)
  kept = 0
  if config.encoder == "longer" and layer == 0:
    kept = config.recent_len
  return event_case.transformer_layer(params, h, num_queries=kept)


def _boost(config, params, x):
  mixed = oracles.token_mixing(x[:, None])
  if not config.paper_literal:
    mixed = layer_norm(params["mix_norm"], mixed)
  x = x + oracles.per_token_ffn(params["ffn"], mixed)[:, 0]
  return x if config.paper_literal else layer_norm(params["output_norm"], x)


class EquationTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("longer", {}),
    ("full", {"encoder": "full", "head_input": "queries"}),
    ("swiglu", {"encoder": "swiglu", "pooled": "own"}),
    ("literal", {"paper_literal": True, "decode_residual": False}),
    ("no_pooled", {"query_input": "features", "head_input": "mean"}),
    (
      "target",
      {"query_input": "target", "target_features": ["item_id", "author_id"]},
    ),
    ("merged", {"merge_sequences": True, "num_queries": [2]}),
    ("more_queries", {"num_queries": [2, 1], "reinject_features": True}),
    ("narrow", {"event_dim": 6, "query_input": "features", "query_dim": 5}),
  )
  def test_equals_the_equations(self, overrides):
    method, batch = load(**overrides), event_case.make_batch()
    params, tables = oracles.random_variables(method)
    actual = compiled(method)(params, tables, batch)
    expected = oracle(method, params, tables, batch)
    self.assertGreater(np.std(expected), 0.1)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)

  def test_merged_sequences_are_in_the_order_of_time(self):
    rng = np.random.default_rng(0)
    parts = {}
    for name, number in (("a", 2), ("b", 3)):
      mask = jnp.asarray([[False] * (4 - number) + [True] * number])
      age = jnp.asarray(np.sort(rng.random((1, 4)))[:, ::-1], jnp.float32)
      vectors = jnp.asarray(rng.normal(size=(1, 4, 2)), jnp.float32)
      parts[name] = events_lib.Events(vectors, mask, age)
    merged = events_lib.merge_events(parts, jnp.zeros((2, 2)))
    every = [
      (float(part.age[0, i]), np.asarray(part.vectors[0, i]))
      for part in parts.values()
      for i in range(4)
      if part.mask[0, i]
    ]
    every.sort(key=lambda event: -event[0])
    self.assertEqual(merged.mask[0].tolist(), [False] * 3 + [True] * 5)
    np.testing.assert_allclose(merged.age[0, 3:], [age for age, _ in every])
    np.testing.assert_allclose(merged.vectors[0, 3:], [v for _, v in every])
    self.assertFalse(merged.vectors[0, :3].any())


class PropertyTest(parameterized.TestCase):
  def test_mixing_is_its_own_inverse(self):
    x = jax.random.normal(jax.random.key(0), (4, 3, 8))
    self.assertTrue((token_mixing(x) != x).any())
    np.testing.assert_array_equal(token_mixing(token_mixing(x)), x)

  @parameterized.named_parameters(
    ("plain", {}), ("merged", {"merge_sequences": True})
  )
  def test_shorter_arrays_of_the_same_events_change_nothing(self, overrides):
    method = load(**overrides)
    params, tables = oracles.random_variables(method)
    batch = event_case.make_batch(cut=4)

    def pad(x):
      return jnp.pad(x, ((0, 0), (0, 2)))

    names = ("watched", "watched_author", "watched_hour")
    padded = batch.replace(
      ids=batch.ids | {name: pad(batch.ids[name]) for name in names},
      id_mask=batch.id_mask | {n: pad(batch.id_mask[n]) for n in names},
      event_age={"watched": pad(batch.event_age["watched"])},
    )
    forward = compiled(method)
    np.testing.assert_allclose(
      forward(params, tables, batch),
      forward(params, tables, padded),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_order_matters_by_position_alone(self):
    """SwiGLU without positions takes a sequence as a set; nothing else does."""
    batch = event_case.make_batch()
    batch = batch.replace(event_age={"watched": batch.event_age["watched"] * 0})
    names = ("watched", "watched_author", "watched_hour")

    def reverse(name):
      mask = batch.id_mask[name]
      return events_lib.align_last(batch.ids[name], mask)[:, ::-1]

    turned = batch.replace(ids=batch.ids | {n: reverse(n) for n in names})
    for encoder, is_set in (
      ("swiglu", True),
      ("full", True),
      ("longer", False),
    ):
      method = load(encoder=encoder)
      params, tables = oracles.random_variables(method)
      forward = compiled(method)
      moved = abs(
        forward(params, tables, batch) - forward(params, tables, turned)
      ).max()
      self.assertGreater(moved, 1e-3, encoder)
      params["events"]["watched_position"] *= 0
      moved = abs(
        forward(params, tables, batch) - forward(params, tables, turned)
      ).max()
      if is_set:
        self.assertLess(moved, 1e-4, encoder)
      else:
        self.assertGreater(moved, 1e-3, encoder)

  def test_events_beyond_the_recent_ones_are_read(self):
    method, batch = load(), event_case.make_batch()
    params, tables = oracles.random_variables(method)
    ids = batch.ids["watched"]
    other = batch.replace(
      ids=batch.ids | {"watched": ids.at[1, 0].set((ids[1, 0] + 1) % 30)}
    )
    forward = compiled(method)
    first, second = (forward(params, tables, b) for b in (batch, other))
    self.assertGreater(abs(first - second)[1], 1e-4)

  def test_remat_and_chunks_change_nothing(self):
    batch = event_case.make_batch()
    plain = load(encoder="full", num_layers=1)
    saving = load(encoder="full", num_layers=1, remat=True, attention_chunk=4)
    params, tables = oracles.random_variables(plain)

    def loss(method, params):
      rows = method.read(tables, batch)
      return method.apply(params, tables, rows, batch, train=False)[0][
        "click"
      ].sum()

    first, second = (
      jax.jit(jax.value_and_grad(functools.partial(loss, method)))(params)
      for method in (plain, saving)
    )
    chex.assert_trees_all_close(first, second, rtol=1e-4, atol=1e-4)


class UserStateTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("longer", {}),
    ("full", {"encoder": "full"}),
    ("merged", {"merge_sequences": True}),
  )
  def test_one_state_serves_all_candidates_of_a_user(self, overrides):
    method = load(**overrides)
    params, tables = oracles.random_variables(method)
    users, each = 2, 3
    first = event_case.make_batch(size=6)
    # The sequences of each user, three times; candidates of their own.
    repeat = lambda x: jnp.repeat(x[1 : 1 + users], each, axis=0)  # noqa: E731
    lists = {n for n in first.ids if n.startswith(("watched", "liked"))}
    batch = first.replace(
      ids={n: repeat(v) if n in lists else v for n, v in first.ids.items()},
      id_mask={
        n: repeat(v) if n in lists else v for n, v in first.id_mask.items()
      },
      event_age={n: repeat(v) for n, v in first.event_age.items()},
    )
    user_batch = jax.tree.map(lambda x: x[::each], batch)

    def call(name, *args):
      *args, batch = args
      rows = split_rows(method, tables, batch)
      return method.model.apply(
        {"params": params}, *args, batch, rows, method=name
      )

    state = jax.jit(functools.partial(call, "encode_user"))(user_batch)
    self.assertEqual({len(x) for x in jax.tree.leaves(state)}, {users})
    predictions, _ = jax.jit(functools.partial(call, "decode"))(state, batch)
    np.testing.assert_allclose(
      predictions["click"],
      compiled(method)(params, tables, batch),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_no_candidate_leaks_into_the_state(self):
    method, batch = load(), event_case.make_batch()
    params, tables = oracles.random_variables(method)
    rows = split_rows(method, tables, batch)

    def total(rows, dense, content):
      other = batch.replace(dense=dense, vectors={"content": content})
      state = method.model.apply(
        {"params": params}, other, {"embedding": rows}, method="encode_user"
      )
      return sum((x * 1.0).sum() for x in jax.tree.leaves(state))

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(
      rows["embedding"], batch.dense, batch.vectors["content"]
    )
    for name, grad in grads[0].items():
      is_event = name.startswith(("watched", "liked"))
      self.assertEqual(bool(jnp.any(grad != 0)), is_event, name)
    self.assertFalse(jnp.any(grads[1]) or jnp.any(grads[2]))


class MistakeTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      {"token_dim": 10},
      "token_dim .10. must be a multiple of model.num_tokens",
    ),
    ({"num_heads": 3}, "token_dim .8. must be a multiple of model.num_heads"),
    ({"event_dim": 7}, "event_dim .7. must be a multiple of model.num_heads"),
    ({"encoder": "longest"}, "unknown model.encoder.*did you mean 'longer'"),
    ({"attention": "flash"}, "unknown model.attention 'flash'"),
    ({"num_queries": [0]}, "num_queries must be at least 1"),
    ({"encoder_mlp_ratio": 0.0}, "encoder_mlp_ratio must be above 0"),
  )
  def test_in_the_config(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)

  @parameterized.parameters(
    ({"num_queries": [1, 1, 1]}, "for each sequence: watched, liked"),
    ({"num_queries": [2, 2]}, "num_tokens .4. must be above .* .4."),
    (
      {"query_input": "target", "target_features": ["tags"]},
      "'tags' must be a single-valued",
    ),
  )
  def test_with_this_data(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      jax.eval_shape(load(**overrides).init, jax.random.key(0))

  def test_data_without_sequences(self):
    schema = events_lib.without_sequences(SCHEMA)
    method = method_lib.load("hyformer", TINY, schema)
    with self.assertRaisesRegex(UserError, "reads sequences and the data has"):
      jax.eval_shape(method.init, jax.random.key(0))

  def test_data_without_a_candidate(self):
    schema = dataclasses.replace(
      SCHEMA, roles=dataclasses.replace(SCHEMA.roles, item=None)
    )
    method = method_lib.load(
      "hyformer", TINY | {"query_input": "target"}, schema
    )
    with self.assertRaisesRegex(UserError, "no feature has the role 'item'"):
      jax.eval_shape(method.init, jax.random.key(0))


if __name__ == "__main__":
  absltest.main()
