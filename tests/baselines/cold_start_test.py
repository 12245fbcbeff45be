"""Baselines of cold starts on one backbone: equations, stages, frozen parts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import train_state
from recjax.baselines import dropoutnet, metaemb
from recjax.errors import UserError
from tests import feedback_case, oracles

OPTIMIZER = optimizer_lib.Config(learning_rate=0.01)
NAMES = (
  "two_towers",
  "content_average",
  "dropoutnet",
  "cb2cf",
  "metaemb",
  "plate",
  "ppr",
)


@functools.cache
def load(name, **overrides):
  config = {
    "embed_dim": 4,
    "towers": feedback_case.TOWERS,
    "dropout_rate": 0.0,
  }
  return method_lib.load(name, config | overrides, feedback_case.SCHEMA)


@functools.cache
def compiled(name, is_training):
  method = load(name)

  def run(params, tables, batch):
    rows = method.read(tables, batch)
    rng = jax.random.key(0)
    return method.apply(
      params, tables, rows, batch, train=is_training, rng=rng
    )[:2]

  return jax.jit(run)


def forward(name, is_training=False, batch=None, **changed):
  """Predictions and aux with random variables, some of them changed."""
  params, tables = oracles.random_variables(load(name))
  params |= changed
  batch = feedback_case.make_batch() if batch is None else batch
  return (*compiled(name, is_training)(params, tables, batch), params, tables)


def is_cold(batch, below=3):
  return np.asarray(batch.ids["item_positives"]) < below


def item_vector(params, item_id, genre):
  """The item tower, in float64."""
  tower = oracles.to_float64(params["backbone"])
  features = genre @ tower["item_features"]["kernel"]
  features = features + tower["item_features"]["bias"]
  inputs = np.concatenate([item_id, features], axis=-1)
  return inputs @ tower["item"]["kernel"]


def embeddings(method, tables, batch):
  return oracles.feature_rows(
    method.tables["embedding"],
    np.asarray(tables["embedding"], np.float64),
    batch,
  )


class StagesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("two_towers", {}, 2, None, None),
    ("two_towers", {"tune": "all"}, 3, None, None),
    ("dropoutnet", {}, 2, None, None),
    ("cb2cf", {}, 3, {"hidden", "content"}, set()),
    ("content_average", {}, 3, set(), {"average"}),
    ("metaemb", {}, 3, {"generator"}, set()),
    ("plate", {}, 3, {"domain"}, {"prompt_user"}),
    ("ppr", {}, 3, {"prefix"}, set()),
  )
  def test_the_last_stage_tunes(self, name, words, number, moving, tables):
    method = load(name, **words)
    self.assertLen(method.stages, number)
    self.assertEqual(
      [stage.predictions for stage in method.stages[:2]], ["sequence", "towers"]
    )
    if moving is None:
      return
    config = train_state.StepConfig(method, method.stages[-1], OPTIMIZER, 10)
    batch = feedback_case.make_batch()

    def step(rng):
      state = train_state.init_state(rng, config)
      return state, train_state.train_step(state, batch, config)[0]

    before, after = jax.jit(step)(jax.random.key(0))
    for part, old in before.params.items():
      same = jax.tree.map(
        lambda a, b: bool(jnp.all(a == b)), old, after.params[part]
      )
      self.assertEqual(all(jax.tree.leaves(same)), part not in moving, part)
    for table, old in before.tables.items():
      same = bool(jnp.all(old == after.tables[table]))
      self.assertEqual(same, table not in tables, table)

  @parameterized.parameters("content_average", "dropoutnet", "cb2cf", "metaemb")
  def test_cold_items_need_features(self, name):
    towers = {k: v for k, v in feedback_case.TOWERS.items() if k[0] != "i"}
    with self.assertRaisesRegex(UserError, "item_features is empty"):
      load.__wrapped__(name, towers=towers).tables  # noqa: B018

  @parameterized.parameters(
    ("two_towers", {"tune": "some"}, "tune 'some'"),
    ("dropoutnet", {"id_dropout_rate": 1.0}, "id_dropout_rate must lie"),
    ("metaemb", {"alpha": 2.0}, "alpha must lie"),
    ("plate", {"popularity": "genres"}, "unknown feature 'genres'"),
    ("ppr", {"num_prefix": 0}, "num_prefix must be at least 1"),
    ("ppr", {"towers": {"num_heads": 2}}, "user_features is empty"),
  )
  def test_mistakes_are_user_errors(self, name, words, message):
    with self.assertRaisesRegex(UserError, message):
      load.__wrapped__(name, **words).tables  # noqa: B018


class DropoutNetTest(absltest.TestCase):
  def test_a_cold_item_is_served_without_its_id(self):
    batch = feedback_case.make_batch()
    ids = batch.ids | {"item_id": batch.ids["item_id"][::-1]}
    other = batch.replace(ids=ids)
    first = forward("dropoutnet", batch=batch)[0]["click"]
    second = forward("dropoutnet", batch=other)[0]["click"]
    cold = is_cold(batch)
    changed = np.asarray(batch.ids["item_id"] != ids["item_id"])
    np.testing.assert_array_equal(first[cold], second[cold])
    self.assertTrue(np.all((first != second)[~cold & changed]))
    self.assertGreater((cold & changed).sum(), 2)

  def test_ids_are_dropped_at_the_rate(self):
    keep = dropoutnet.keep_id(jax.random.key(0), 20_000, 0.3)
    self.assertAlmostEqual(float(keep.mean()), 0.7, delta=0.02)

  def test_training_drops_the_whole_id(self):
    params, tables = oracles.random_variables(load("dropoutnet"))
    batch = feedback_case.make_batch()
    scores, _ = compiled("dropoutnet", True)(params, tables, batch)
    values = embeddings(load("dropoutnet"), tables, batch)
    towers = forward("two_towers")[1]["towers"]["click"]
    self.assertEqual(scores["click"].shape, towers.shape)
    # With the id or without: each score is one of the two.
    with_id = item_vector(params, values["item_id"], values["genre"])
    without = item_vector(params, 0 * values["item_id"], values["genre"])
    user = self._user(params, tables, batch)
    expected = [np.sum(user * v, axis=1) for v in (with_id, without)]
    near = [np.isclose(scores["click"], e, rtol=1e-3) for e in expected]
    self.assertTrue(np.all(near[0] | near[1]))
    self.assertTrue(near[0].any() and near[1].any())

  def _user(self, params, tables, batch):
    method = load("dropoutnet")
    rows = method.read_features(tables, batch)
    encoded = method.call(params, tables, batch, rows, method="encode_user")
    tower = oracles.to_float64(params["backbone"])
    values = embeddings(method, tables, batch)
    profile = np.concatenate([values["city"], np.asarray(batch.dense)], 1)
    profile = profile @ tower["user_features"]["kernel"]
    profile += tower["user_features"]["bias"]
    inputs = np.concatenate([values["user_id"], encoded, profile], 1)
    return inputs @ tower["user_click"]["kernel"]


class Cb2cfTest(absltest.TestCase):
  def test_the_content_predicts_the_embedding(self):
    batch = feedback_case.make_batch()
    _, aux, params, tables = forward("cb2cf", batch=batch)
    method = load("cb2cf")
    values = embeddings(method, tables, batch)
    hidden, out = (oracles.to_float64(params[n]) for n in ("hidden", "content"))
    x = np.tanh(values["genre"] @ hidden["kernel"] + hidden["bias"])
    predicted = x @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(
      aux["predicted"], predicted, rtol=1e-4, atol=1e-5
    )
    terms = method.module.loss_fn(aux["towers"], aux, batch, method.config)
    warm = ~is_cold(batch)
    error = np.sum((predicted - values["item_id"])[warm] ** 2)
    np.testing.assert_allclose(terms["content"][0], error, rtol=1e-4)
    self.assertEqual(terms["content"][1], warm.sum())

  def test_it_stands_in_for_cold_ids_alone(self):
    batch = feedback_case.make_batch()
    predictions, aux, *_ = forward("cb2cf", batch=batch)
    cold = is_cold(batch)
    same = np.isclose(predictions["click"], aux["towers"]["click"], rtol=1e-5)
    np.testing.assert_array_equal(same, ~cold)


class ContentAverageTest(absltest.TestCase):
  def test_the_loss_is_least_at_the_means_of_warm_items(self):
    method, batch = load("content_average"), feedback_case.make_batch()
    params, tables = oracles.random_variables(method)
    ids = np.asarray(embeddings(method, tables, batch)["item_id"])
    genre, warm = np.asarray(batch.ids["genre"]), ~is_cold(batch)
    average = np.zeros(tables["average"].shape, np.float32)
    for value in np.unique(genre[warm]):
      rows = ids[warm & (genre == value)]
      self.assertTrue(np.abs(rows).max() > 0)
      average[method.tables["average"].first_row["genre"] + value] = rows.mean(
        axis=0
      )

    def loss(average):
      rows = method.read_features(tables | {"average": average}, batch)
      predictions, aux = method.call(params, tables, batch, rows, train=False)
      terms = method.module.loss_fn(predictions, aux, batch, method.config)
      return terms["average"][0]

    grad = jax.grad(loss)
    np.testing.assert_allclose(grad(average), 0, atol=1e-5)
    self.assertGreater(float(jnp.abs(grad(average + 0.1)).max()), 0.1)

  def test_it_stands_in_for_cold_ids_alone(self):
    batch = feedback_case.make_batch()
    predictions, aux, *_ = forward("content_average", batch=batch)
    cold = is_cold(batch)
    same = np.isclose(predictions["click"], aux["towers"]["click"], rtol=1e-5)
    np.testing.assert_array_equal(same, ~cold)
    # Two cold items of one genre are alike, whatever their ids.
    ids = batch.ids | {"item_id": batch.ids["item_id"][::-1]}
    other, *_ = forward("content_average", batch=batch.replace(ids=ids))
    np.testing.assert_array_equal(
      predictions["click"][cold], other["click"][cold]
    )

  def test_numbers_have_no_means(self):
    towers = feedback_case.TOWERS | {"item_features": ("age",)}
    with self.assertRaisesRegex(UserError, "none of them is a feature of ids"):
      load.__wrapped__("content_average", towers=towers).tables  # noqa: B018


class MetaEmbTest(absltest.TestCase):
  def test_the_inner_step_equals_a_loop_over_items(self):
    rng = np.random.default_rng(0)
    item, first = rng.integers(0, 4, 12), rng.random(12) < 0.5
    embedding = rng.normal(size=(4, 3))[item]
    residuals, directions = rng.normal(size=12), rng.normal(size=(12, 3))
    actual = metaemb.inner_step(
      *(
        jnp.asarray(x, jnp.float32) for x in (embedding, residuals, directions)
      ),
      jnp.asarray(item),
      jnp.asarray(first),
      0.3,
    )
    for row in range(12):
      gradient = np.zeros(3)
      mine = np.flatnonzero((item == item[row]) & first)
      for example in mine:
        gradient += residuals[example] * directions[example] / len(mine)
      np.testing.assert_allclose(
        actual[row], embedding[row] - 0.3 * gradient, rtol=1e-4, atol=1e-6
      )

  def test_the_step_is_a_gradient_step_of_the_first_minibatch(self):
    """Against JAX's gradient of the loss by one item's embedding."""
    method, batch = load("metaemb"), feedback_case.make_batch()
    ids = batch.ids | {"item_id": jnp.full(16, 5), "genre": jnp.full(16, 2)}
    batch = batch.replace(ids=ids)
    _, aux, params, tables = forward("metaemb", True, batch)
    values = embeddings(method, tables, batch)
    dense = oracles.to_float64(params["generator"]["dense"])
    generated = np.tanh(values["genre"] @ dense["kernel"] + dense["bias"])
    generated *= np.asarray(params["generator"]["scale"], np.float64)
    first = np.asarray(aux["first"])
    np.testing.assert_array_equal(first, np.asarray(ids["user_id"]) % 2 == 0)
    # Scores are linear in the item's vector: two of them give the user.
    kernel = np.asarray(params["backbone"]["item"]["kernel"], np.float64)[:4]

    def scores(vectors):
      moved = dict(tables)
      rows = method.read_features(moved, batch)
      rows["embedding"]["item_id"] = jnp.asarray(vectors, jnp.float32)
      _, out = method.call(params, tables, batch, rows, train=False)
      return np.asarray(out["towers"]["click"], np.float64)

    base = scores(generated)
    direction = np.stack(
      [scores(generated + np.eye(4)[i]) - base for i in range(4)], axis=1
    )
    self.assertEqual(kernel.shape, (4, 4))
    labels = np.asarray(batch.labels["click"])
    gradient = (oracles.sigmoid(base) - labels)[:, None] * direction
    step = method.config.inner_learning_rate * gradient[first].mean(0)
    expected = scores(generated - step)
    np.testing.assert_allclose(
      aux["warmed"]["click"], expected, rtol=2e-3, atol=1e-2
    )

  def test_the_loss_weighs_both_minibatches(self):
    method, batch = load("metaemb"), feedback_case.make_batch()
    predictions, aux, *_ = forward("metaemb", True, batch)
    total, weight = method.module.loss_fn(
      predictions, aux, batch, method.config
    )["click"]
    labels, first = np.asarray(batch.labels["click"]), np.asarray(aux["first"])
    expected = 0.0
    for scores, part, share in (
      (predictions["click"], first, 0.1),
      (aux["warmed"]["click"], ~first, 0.9),
    ):
      scores = np.asarray(scores, np.float64)
      loss = np.logaddexp(0, scores) - labels * scores
      expected += share * loss[part].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    self.assertEqual(weight, 16)

  def test_cold_items_are_served_with_the_generated_id(self):
    batch = feedback_case.make_batch()
    predictions, aux, *_ = forward("metaemb", batch=batch)
    same = np.isclose(predictions["click"], aux["towers"]["click"], rtol=1e-5)
    np.testing.assert_array_equal(same, ~is_cold(batch))


class PromptsTest(absltest.TestCase):
  def test_plate_adds_a_prompt_to_each_id(self):
    method, batch = load("plate"), feedback_case.make_batch()
    predictions, aux, params, tables = forward("plate", batch=batch)
    # The same model whose ids hold the prompts already.
    user = np.asarray(batch.ids["user_id"])
    rows = method.read_features(tables, batch)
    rows["embedding"]["user_id"] += tables["prompt_user"][user]
    domain = (~is_cold(batch)).astype(int)
    rows["embedding"]["item_id"] += params["domain"][domain]
    _, expected = method.call(params, tables, batch, rows, train=False)
    np.testing.assert_allclose(
      predictions["click"], expected["towers"]["click"], rtol=1e-4, atol=1e-4
    )
    zero = {"domain": jnp.zeros_like(params["domain"])}
    tables["prompt_user"] *= 0
    without, _ = compiled("plate", False)(params | zero, tables, batch)
    np.testing.assert_allclose(
      without["click"], aux["towers"]["click"], rtol=1e-5
    )

  def test_ppr_puts_the_profile_before_the_history(self):
    method, batch = load("ppr"), feedback_case.make_batch()
    _, _, params, tables = forward("ppr", batch=batch)
    rows = method.read_features(tables, batch)
    prompted, plain = method.call(
      params, tables, batch, rows, method="encode_user"
    )
    self.assertGreater(float(jnp.abs(prompted - plain).max()), 1e-3)
    # A user without a history has a vector of its profile alone.
    empty = batch.id_mask["positive_history"].sum(1) == 0
    self.assertTrue(bool(empty.any()))
    self.assertFalse(bool(plain[empty].any()))
    self.assertTrue(bool(jnp.all(jnp.any(prompted[empty] != 0, axis=1))))
    # Another city, another prefix; the plain vector knows nothing of it.
    city = {"city": rows["embedding"]["city"][::-1]}
    other = rows | {"embedding": rows["embedding"] | city}
    moved, same = method.call(
      params, tables, batch, other, method="encode_user"
    )
    chex.assert_trees_all_equal(plain, same)
    self.assertGreater(float(jnp.abs(prompted - moved).max()), 1e-3)


if __name__ == "__main__":
  absltest.main()
