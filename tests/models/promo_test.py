"""PROMO's equations in float64 NumPy, its stages, and its early stop."""

import functools
import itertools
import json
import pathlib
import tempfile
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import serve, train, train_state
from recjax.data import columns as columns_lib
from recjax.errors import UserError
from recjax.layers import prompt as prompt_lib
from recjax.models import promo
from tests import feedback_case, oracles

TINY = {
  "embed_dim": 4,
  "hidden_dim": 3,
  "towers": feedback_case.TOWERS,
  "dropout_rate": 0.0,
}
OPTIMIZER = optimizer_lib.Config(learning_rate=0.01)


@functools.cache
def load(**overrides):
  return method_lib.load("promo", TINY | overrides, feedback_case.SCHEMA)


def forward(method, params, tables, batch, is_training=True):
  """(predictions, aux)."""

  def run(params, tables, batch):
    rows = method.read(tables, batch)
    rng = jax.random.key(0)
    return method.apply(
      params, tables, rows, batch, train=is_training, rng=rng
    )[:2]

  return jax.jit(run)(params, tables, batch)


def phi(weights, users, use_relu):
  """The network of one item on one user after the other."""
  outputs = []
  for user in users:
    hidden = user @ weights["w1"] + weights["b1"]
    hidden = np.maximum(hidden, 0) if use_relu else hidden
    outputs.append(hidden @ weights["w2"] + weights["b2"])
  return np.stack(outputs) if outputs else np.zeros((0, len(weights["b2"])))


def cut(flat, d, h, out):
  """theta as W1, b1, W2, b2."""
  at = np.cumsum([0, d * h, h, h * out, out])
  w1, b1, w2, b2 = (flat[i:j] for i, j in itertools.pairwise(at))
  return {"w1": w1.reshape(d, h), "b1": b1, "w2": w2.reshape(h, out), "b2": b2}


def oracle(method, params, tables, batch):
  """Logits by the equations, one example after the other."""
  config = method.config
  params, tables = oracles.to_float64((params, tables))
  rows = {
    name: oracles.feature_rows(table, tables[name], batch)
    for name, table in method.tables.items()
  }
  scores, towers = [], []
  for b in range(batch.size):
    base = {k: v[b] for k, v in rows["embedding"].items()}
    mask = np.asarray(batch.id_mask["positive_history"][b])
    history = rows["sequence"]["positive_history"][b][mask]
    sequence = encode(params["sequence_encoder"], history, config)
    tower = params["backbone"]
    age = np.asarray(batch.dense[b], np.float64)
    profile = _dense(tower["user_features"], np.r_[base["city"], age])
    user = np.r_[base["user_id"], sequence, profile]
    user = user @ tower["user_click"]["kernel"]
    genre = _dense(tower["item_features"], base["genre"])
    item = np.r_[base["item_id"], genre] @ tower["item"]["kernel"]
    e = rows["prompt_item"]["item_id"][b]
    generated = _dense(params["prompt"]["generator"], e)
    dim = config.embed_dim
    weights = cut(generated[dim:], dim, config.hidden_dim, dim)
    valid = np.asarray(batch.id_mask["pinnacle_users"][b])
    users = rows["prompt_user"]["pinnacle_users"][b][valid]
    positive = phi(weights, users, config.use_relu)
    positive = pool(positive, config.pooling)
    extended = np.r_[item, positive, generated[:dim]]
    extended = extended @ params["fuse"]["dense"]["kernel"]
    scores.append(user @ extended)
    towers.append(user @ item)
  return np.array(scores), np.array(towers)


def encode(params, events, config):
  """SASRec's blocks with one attention head after the other."""
  size, dim = events.shape
  x = events * np.sqrt(dim) + params["positions"][:size]
  heads = config.towers.num_heads
  width = dim // heads
  for i in range(config.towers.num_blocks):
    query = _norm(params[f"query_norm_{i}"], x)
    q = _dense(params[f"query_{i}"], query)
    k, v = (_dense(params[f"{n}_{i}"], x) for n in ("key", "value"))
    mixed = np.zeros_like(x)
    for t, h in itertools.product(range(size), range(heads)):
      part = slice(h * width, (h + 1) * width)
      logits = k[: t + 1, part] @ q[t, part] / np.sqrt(width)
      mixed[t, part] = oracles.softmax(logits) @ v[: t + 1, part]
    x = _norm(
      params[f"ffn_norm_{i}"], query + _dense(params[f"mix_{i}"], mixed)
    )
    hidden = np.maximum(_dense(params[f"up_{i}"], x), 0)
    x = x + _dense(params[f"down_{i}"], hidden)
  x = _norm(params["last_norm"], x)
  return x.mean(0) if size else np.zeros(dim)


def pool(values, pooling):
  return values.sum(0) / (max(len(values), 1) if pooling == "mean" else 1)


def _norm(params, x):
  return oracles.layer_norm(x, params["scale"], params["bias"])


def _dense(params, x):
  return x @ params["kernel"] + params["bias"]


class EquationsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({},),
    ({"use_relu": True, "pooling": "mean"},),
    ({"use_relu": True},),
    ({"pooling": "mean"},),
  )
  def test_generated_networks_equal_a_loop_over_items(self, overrides):
    method, batch = load(**overrides), feedback_case.make_batch(size=8)
    # An item without feedback and a user without a history.
    mask = dict(batch.id_mask)
    mask["pinnacle_users"] = mask["pinnacle_users"].at[1].set(False)
    mask["positive_history"] = mask["positive_history"].at[2].set(False)
    batch = batch.replace(id_mask=mask)
    params, tables = oracles.random_variables(method)
    predictions, aux = forward(method, params, tables, batch)
    scores, towers = oracle(method, params, tables, batch)
    np.testing.assert_allclose(
      predictions["click"], scores, rtol=2e-3, atol=1e-2
    )
    np.testing.assert_allclose(
      aux["towers"]["click"], towers, rtol=1e-3, atol=1e-3
    )

  @parameterized.product(
    use_relu=(False, True),
    pooling=prompt_lib.POOLINGS,
    normalization=("sum", "mean"),
  )
  def test_the_bracket_is_the_sum_over_all_pairs(
    self, use_relu, pooling, normalization
  ):
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(5, prompt_lib.weight_count(4, 3, 2)))
    users = rng.normal(size=(2, 5, 6, 4))
    lengths = np.array([[6, 1, 0, 3, 2], [2, 6, 3, 0, 6]])
    masks = np.arange(6) < lengths[..., None]
    weights = prompt_lib.split_weights(jnp.asarray(flat, jnp.float32), 4, 3, 2)
    pooled = [
      prompt_lib.pool_users(
        jnp.asarray(u, jnp.float32), jnp.asarray(m), weights, use_relu, pooling
      )
      for u, m in zip(users, masks, strict=True)
    ]
    valid = np.array([True, True, True, True, False])
    total, weight = promo.feedback_enhancement(
      prompt_lib.Prompts(*pooled, prompt=None),
      *map(jnp.asarray, masks),
      jnp.asarray(valid),
      pooling,
      normalization,
    )
    expected = 0.0
    for i in np.flatnonzero(valid):
      network = cut(flat[i], 4, 3, 2)
      plus, minus = (
        phi(network, users[side, i][masks[side, i]], use_relu)
        for side in (0, 1)
      )
      bracket = np.zeros(2)
      for p, n in itertools.product(plus, minus):
        bracket += p - n
      if normalization == "mean":
        bracket /= max(len(plus) * len(minus), 1)
      expected += np.logaddexp(0, -bracket).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    self.assertEqual(weight, 4)

  @parameterized.parameters("sum", "mean")
  def test_cold_positives_against_popular_negatives(self, normalization):
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=12), rng.integers(0, 2, 12)
    popular, mask = rng.random(12) < 0.5, rng.random(12) < 0.8
    total, weight = promo.item_enhancement(
      jnp.asarray(scores, jnp.float32),
      jnp.asarray(labels, jnp.float32),
      jnp.asarray(mask),
      jnp.asarray(popular),
      normalization,
    )
    cold = scores[mask & ~popular & (labels == 1)]
    hot = scores[mask & popular & (labels == 0)]
    pairs = [c - h for c, h in itertools.product(cold, hot)]
    self.assertGreater(len(pairs), 1)
    bracket = np.sum(pairs) if normalization == "sum" else np.mean(pairs)
    np.testing.assert_allclose(total, np.logaddexp(0, -bracket), rtol=1e-5)
    self.assertEqual(weight, 1)

  def test_a_batch_without_a_pair_weighs_nothing(self):
    ones = jnp.ones(3)
    for popular in (ones > 0, ones < 0):
      total, weight = promo.item_enhancement(ones, ones, ones > 0, popular)
      self.assertEqual((float(total), float(weight)), (0, 0))

  def test_zero_prompts_leave_the_backbone(self):
    method, batch = load(), feedback_case.make_batch()
    params, tables = jax.jit(method.init)(jax.random.key(0))
    tables["embedding"] += 0.3
    zero = jax.tree.map(jnp.zeros_like, params["prompt"])
    predictions, aux = forward(
      method, params | {"prompt": zero}, tables, batch, is_training=False
    )
    np.testing.assert_allclose(
      predictions["click"], aux["towers"]["click"], rtol=1e-5, atol=1e-6
    )
    predictions, aux = forward(method, params, tables, batch, False)
    difference = predictions["click"] - aux["towers"]["click"]
    self.assertGreater(float(jnp.abs(difference).max()), 1e-4)

  def test_negatives_are_for_the_loss_alone(self):
    method, batch = load(), feedback_case.make_batch()
    params, tables = oracles.random_variables(method)
    ids = batch.ids | {"negative_users": batch.ids["negative_users"][::-1]}
    for is_training in (True, False):
      first, _ = forward(method, params, tables, batch, is_training)
      second, aux = forward(
        method, params, tables, batch.replace(ids=ids), is_training
      )
      chex.assert_trees_all_equal(first, second)
      self.assertEqual(aux["prompts"].negative is not None, is_training)

  def test_masked_users_and_events_change_nothing(self):
    method, batch = load(), feedback_case.make_batch()
    params, tables = oracles.random_variables(method)
    ids = {
      name: jnp.where(batch.id_mask[name], value, 3)
      if name in batch.id_mask
      else value
      for name, value in batch.ids.items()
    }
    chex.assert_trees_all_close(
      forward(method, params, tables, batch)[0],
      forward(method, params, tables, batch.replace(ids=ids))[0],
      rtol=1e-5,
    )

  def test_released_sizes(self):
    self.assertEqual(prompt_lib.weight_count(16, 16, 16), 544)
    overrides = {"embed_dim": 16, "hidden_dim": 16, "towers": {}}
    method = load.__wrapped__(**overrides)
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    self.assertEqual(params["prompt"]["generator"]["kernel"].shape, (16, 560))
    self.assertEqual(params["fuse"]["dense"]["kernel"].shape, (48, 16))
    self.assertEqual(params["backbone"]["user_click"]["kernel"].shape, (32, 16))


class StagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, {"sequence_encoder"}, {"sequence"}),
    (1, {"backbone"}, {"embedding"}),
    (2, {"prompt", "fuse"}, {"prompt_item", "prompt_user"}),
  )
  def test_only_its_own_part_moves(self, number, moving, moving_tables):
    method, batch = load(), feedback_case.make_batch()
    config = train_state.StepConfig(
      method, method.stages[number], OPTIMIZER, num_steps=10
    )

    def run(rng):
      state = train_state.init_state(rng, config)
      grads = train_state.loss_and_gradients(state, batch, config)[1]
      return state, grads, train_state.train_step(state, batch, config)[0]

    state, grads, after = jax.jit(run)(jax.random.key(0))
    for part, grad in grads["params"].items():
      norm = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(grad))
      self.assertEqual(norm > 0, part in moving, part)
      same = jax.tree.map(
        lambda a, b: bool(jnp.all(a == b)),
        state.params[part],
        after.params[part],
      )
      self.assertEqual(all(jax.tree.leaves(same)), part not in moving, part)
    self.assertEqual(set(grads["row_grads"]), moving_tables)
    for name, old in state.tables.items():
      same = bool(jnp.all(old == after.tables[name]))
      self.assertEqual(same, name not in moving_tables, name)

  def test_validation_looks_at_what_is_trained(self):
    names = [stage.predictions for stage in promo.STAGES]
    self.assertEqual(names, ["sequence", "towers", ""])
    self.assertEqual(promo.STAGES[1].initialize_from, "best")
    self.assertEqual(promo.STAGES[2].initialize_from, "best")

  def test_the_share_of_tuned_weights_falls_with_the_backbones_tables(self):
    own, shared = load(), load(prompt_tables="backbone")
    self.assertCountEqual(
      set(own.tables) - set(shared.tables), ["prompt_item", "prompt_user"]
    )

  @parameterized.parameters(
    ({"network": "mlp"}, "network 'mlp'"),
    ({"towers": {"history": "seen"}}, "no sequence 'seen'"),
    ({"positive_list": "city"}, "positive_list: the data has no sequence"),
    ({"popularity": "age"}, "popularity: 'age' is no sparse feature"),
    ({"prompt_from": "features", "towers": {}}, "needs item features"),
    ({"towers": {"num_heads": 3}}, "num_heads .3. must divide"),
    ({"pfpe_weight": -1.0}, "pfpe_weight must be at least 0"),
  )
  def test_mistakes_are_user_errors(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load.__wrapped__(**overrides).tables  # noqa: B018

  def test_a_new_item_is_served_by_its_feedback_alone(self):
    """Row 0 stands for an item that training never saw."""
    method = load()
    params, tables = oracles.random_variables(method)
    state = train_state.init_state(
      jax.random.key(0),
      train_state.StepConfig(method, method.stages[2], OPTIMIZER, 1),
    ).replace(params=params, tables=tables)
    ranker = serve.Ranker(
      method,
      (
        "item_id",
        "genre",
        "item_positives",
        "pinnacle_users",
        "negative_users",
      ),
    )
    user = jax.tree.map(lambda x: x[:1], feedback_case.make_batch(1))
    encoded = ranker.encode_user(state, user)
    new = feedback_case.make_batch(2)
    ids = {
      k: jnp.zeros_like(v) if k == "item_id" else jnp.ones_like(v)
      for k, v in new.ids.items()
    }
    ids["pinnacle_users"] = new.ids["pinnacle_users"]
    scores = ranker.score(state, encoded, new.replace(ids=ids))["click"]
    mask = np.asarray(new.id_mask["pinnacle_users"])
    lists = [
      tuple(i[m])
      for i, m in zip(np.asarray(ids["pinnacle_users"]), mask, strict=True)
    ]
    # Items differ by their lists, and the order of a list says nothing.
    distinct = {tuple(sorted(users)) for users in lists}
    self.assertGreater(len(distinct), 8)
    self.assertLen(set(np.round(np.asarray(scores), 4).tolist()), len(distinct))


class EarlyStopTest(absltest.TestCase):
  def test_the_trainer_catches_a_collapse(self):
    """L_pfpe of a huge weight, on lists of noise, ruins the third stage."""
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    directory = folder.name
    data = f"{directory}/data"
    feedback_case.write_dataset(data, num_rows=1200)
    config = {
      "model_name": "promo",
      "seed": 0,
      "data": {"name": "toy"},
      "model": TINY | {"pfpe_weight": 1e4},
      "optimizer": {
        "learning_rate": 0.05,
        "sparse": {"learning_rate": 0.3},
      },
      "train": {
        "batch_size": 64,
        "eval_batch_size": 200,
        "num_train_steps": 120,
        "eval_every_steps": 6,
        "early_stop_patience": 2,
        "keep_checkpoints": 1,
      },
      "parallel": {},
    }
    data = columns_lib.Columns(data)
    with mock.patch.object(train, "open_dataset", return_value=data):
      result = train.train_and_evaluate(config, f"{directory}/run", commit="x")
    text = pathlib.Path(f"{directory}/run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    values = {
      line["step"]: line["valid/click/auc"]
      for line in lines
      if "valid/click/auc" in line
    }
    best = result["metrics"]["valid/click/auc"]
    self.assertLess(result["steps"], 120)
    last = values[result["steps"]]
    self.assertGreater(best, last + 0.01)
    self.assertEqual(values[result["best_step"]], best)


if __name__ == "__main__":
  absltest.main()
