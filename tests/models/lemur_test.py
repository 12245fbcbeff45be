"""LEMUR against its equations in float64, and what its bank promises."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import toy
from absl.testing import absltest, parameterized

from recjax import evaluate, flops, train_state
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax.errors import UserError
from recjax.layers.contrastive import ContrastConfig, session_contrast
from recjax.models import lemur

CONFIG = {
  "tasks": ("click",),
  "embed_dim": 4,
  "num_tokens": 2,
  "token_dim": 8,
  "num_layers": 1,
  "encoder": {
    "dim": 8,
    "num_heads": 2,
    "mlp_dim": 6,
    "query_layers": 1,
    "document_layers": 1,
  },
  "decoder_layers": 1,
  "memory_lengths": (3,),
  "bank_dtype": "float32",
}
OPTIMIZER = optimizer_lib.Config(
  learning_rate=0.01, sparse=optimizer_lib.SparseConfig(learning_rate=0.1)
)


def make_method(schema=toy.SCHEMA, **overrides):
  return method_lib.load("lemur", CONFIG | overrides, schema)


class Case:
  def __init__(self, **overrides):
    self.method = make_method(**overrides)
    self.config = train_state.StepConfig(
      self.method, self.method.stages[0], OPTIMIZER, 10
    )
    self.state = random_state(self.config)
    self.step = jax.jit(
      lambda state, batch: train_state.train_step(state, batch, self.config)
    )
    self.gradients = jax.jit(
      lambda state, batch: train_state.loss_and_gradients(
        state, batch, self.config
      )
    )
    self.aux = jax.jit(self._aux)
    self.forward = jax.jit(
      lambda state, batch: evaluate.forward(state, batch, self.method)
    )

  def _aux(self, state, batch):
    """What a training step's forward pass holds."""
    rows = self.method.read(state.tables, batch)
    return self.method.apply(
      state.params, state.tables, rows, batch, train=True, rng=jax.random.key(0)
    )


def random_state(config):
  """Random parameters and an empty bank; spares compiling an initialiser."""
  shapes = jax.eval_shape(
    functools.partial(train_state.init_state, config=config), jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  random = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
  tables = zeros.tables | {"embedding": random(zeros.tables["embedding"])}
  return zeros.replace(params=jax.tree.map(random, zeros.params), tables=tables)


@functools.cache
def case(*items):
  overrides = {k: dict(v) if isinstance(v, frozenset) else v for k, v in items}
  return Case(**overrides)


def contrast(**words):
  return ("contrast", frozenset(words.items()))


def in_bank(state, name="memory_bank"):
  return np.asarray(state.tables[name])


class BankInModelTest(parameterized.TestCase):
  def test_each_document_is_written_as_its_encoder_gives_it(self):
    this, batch = case(), toy.make_batch(num_padding=3)
    after, _ = this.step(this.state, batch)
    vectors = this.aux(this.state, batch)[1]["content"]["document"]
    items, valid = (
      np.asarray(x) for x in (batch.ids["item_id"], batch.example_mask)
    )
    expected = np.zeros_like(in_bank(after))
    for item, vector, ok in zip(items, np.asarray(vectors), valid, strict=True):
      if ok and item:
        expected[item] = vector
    np.testing.assert_allclose(in_bank(after), expected, rtol=1e-4, atol=1e-5)
    stamps = in_bank(after, "memory_bank_step")[:, 0]
    np.testing.assert_array_equal(stamps > 0, np.abs(expected).max(axis=1) > 0)

  def test_a_write_is_seen_by_a_history_of_the_same_step(self):
    this, batch = case(), toy.make_batch()
    state = this.state
    after, _ = this.step(state, batch)
    # Had the bank been written before it was read, and nothing joined.
    written = state.replace(
      tables=state.tables
      | {
        name: after.tables[name] for name in ("memory_bank", "memory_bank_step")
      }
    )
    counters = this.aux(state, batch)[1]["counters"]["bank"]
    expected = this.aux(written, batch)[1]["counters"]["bank"]
    np.testing.assert_allclose(counters["history_3"], expected["history_3"])
    self.assertGreater(counters["history_3"][0], 0)
    self.assertLess(counters["history_3"][0], counters["history_3"][1])
    chex.assert_trees_all_close(
      this.aux(state, batch)[0],
      this.aux(written, batch)[0],
      rtol=1e-5,
    )
    # It matters: without the write the predictions are others.
    stale = this.forward(state, batch)["predictions"]["click"]
    fresh = this.forward(written, batch)["predictions"]["click"]
    self.assertGreater(np.abs(stale - fresh).max(), 1e-6)

  def test_evaluation_reads_the_bank_before_the_batch_is_written(self):
    this = case()
    state, _ = this.step(this.state, toy.make_batch(0))
    batch = toy.make_batch(1)
    whole = this.forward(state, batch)["predictions"]["click"]
    for i in (0, 7):
      one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
      alone = evaluate.forward(state, one, this.method)["predictions"]["click"]
      np.testing.assert_allclose(whole[i : i + 1], alone, rtol=1e-4, atol=1e-6)

  def test_candidates_come_from_the_bank_and_unknown_ones_are_encoded(self):
    this, other = case(), case(("serve_bank", False))
    state, _ = this.step(this.state, toy.make_batch(0))
    batch = toy.make_batch(1)
    stored = in_bank(state, "memory_bank_step")[:, 0] > 0
    is_stored = stored[np.asarray(batch.ids["item_id"])]
    self.assertTrue(0 < is_stored.sum() < batch.size)
    # The parameters moved after the write, so stored vectors are stale.
    bank, encoded = (
      np.asarray(c.forward(state, batch)["predictions"]["click"])
      for c in (this, other)
    )
    differs = np.abs(bank - encoded) > 1e-7
    np.testing.assert_array_equal(differs, is_stored)
    words = this.forward(state, batch)["counters"]
    values = lemur.diagnostics(jax.device_get(words))
    self.assertAlmostEqual(
      values["bank/candidates_coverage"], is_stored.mean(), places=5
    )
    self.assertTrue(0.5 < values["bank/agreement"] < 1)

  def test_a_title_alone_moves_a_new_item(self):
    this, batch = case(), toy.make_batch()
    batch = batch.replace(ids=batch.ids | {"item_id": batch.ids["item_id"] * 0})
    other = batch.replace(
      tokens=batch.tokens | {"title": batch.tokens["title"] % 19 + 1}
    )
    first, second = (
      this.forward(this.state, b)["predictions"]["click"]
      for b in (batch, other)
    )
    has_text = np.asarray(batch.token_mask["title"].any(axis=1))
    np.testing.assert_array_equal(first != second, has_text)


class GradientTest(parameterized.TestCase):
  def encoder_gradient(self, this, batch, name="document_encoder"):
    grads = this.gradients(this.state, batch)[1]["params"]
    return max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[name]))

  def test_without_a_way_back_the_ranker_trains_no_encoder(self):
    off = contrast(weight=0.0)
    this = case(off, ("backward_rate", 0.0))
    self.assertEqual(self.encoder_gradient(this, toy.make_batch()), 0.0)
    self.assertGreater(
      self.encoder_gradient(this, toy.make_batch(), "query_encoder"), 0
    )
    self.assertGreater(self.encoder_gradient(case(off), toy.make_batch()), 1e-4)

  def test_a_stopped_ranker_leaves_the_contrast_alone(self):
    stop = ("ranker_gradient", False)
    silent = case(stop, contrast(weight=0.0))
    for name in ("document_encoder", "query_encoder"):
      self.assertEqual(
        self.encoder_gradient(silent, toy.make_batch(), name), 0.0
      )
      self.assertGreater(
        self.encoder_gradient(case(stop), toy.make_batch(), name), 0
      )

  def test_a_sample_encodes_its_share_and_empty_rows_first(self):
    this = case(("forward_rate", 0.5), ("backward_rate", 0.25))
    batch, state, seen = toy.make_batch(), this.state, set()
    items = np.unique(np.asarray(batch.ids["item_id"]))
    items = set(items[items > 0].tolist())
    for step in range(1, 5):
      state, scalars = this.step(state, batch)
      self.assertEqual(scalars["skipped"][0], 0)
      stamps = in_bank(state, "memory_bank_step")[:, 0]
      written = set(np.flatnonzero(stamps == step).tolist())
      self.assertLessEqual(len(written), 8)
      empty = items - seen
      # The unknown documents, of id 0, take places of their own.
      places = 8 - int((np.asarray(batch.ids["item_id"]) == 0).sum())
      if len(empty) >= places:
        self.assertTrue(written <= empty)
      else:
        self.assertTrue(empty <= written)
      seen |= written
    self.assertEqual(seen, items)

  def test_popular_documents_rest(self):
    this = case(("popular_rate", 0.0), ("popular_count", 2))
    batch = toy.make_batch()
    items = np.asarray(batch.ids["item_id"])
    state = this.state
    for _ in range(3):
      state, _ = this.step(state, batch)
    seen = in_bank(state, "memory_bank_seen")[:, 0]
    expected = 3 * np.bincount(items, minlength=len(seen))[: len(seen)]
    expected[0] = 0
    np.testing.assert_array_equal(seen, expected)
    stamps = in_bank(state, "memory_bank_step")[:, 0]
    once = np.bincount(items, minlength=len(seen))
    for item in set(items.tolist()) - {0}:
      # Popular from the second appearance on, which is counted after a step.
      self.assertEqual(stamps[item], 1 if once[item] >= 2 else 2)


class ContrastTest(parameterized.TestCase):
  @parameterized.product(
    negatives=("batch", "positives"), session=(True, False), same=(True, False)
  )
  def test_equals_a_loop_in_float64(self, negatives, session, same):
    rng = np.random.default_rng(0)
    n = 12
    q, d = rng.normal(size=(2, n, 5))
    positive, trained, present = rng.random((3, n)) < 0.7
    trained &= present
    ids, qid = rng.integers(1, 5, n), rng.integers(0, 3, n)
    config = ContrastConfig(
      negatives=negatives, session_mask=session, mask_same_document=same
    )
    total, count = 0.0, 0
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    for i in range(n):
      if not (positive[i] and trained[i]):
        continue
      right = 50.0 * unit(q[i]) @ unit(d[i])
      bottom = 0.0
      for j in range(n):
        allowed = present[j] and (negatives == "batch" or positive[j])
        allowed &= not (session and qid[i] == qid[j])
        allowed &= not (same and ids[i] == ids[j])
        if i == j or allowed:
          bottom += np.exp(50.0 * unit(q[i]) @ unit(d[j]) - right)
      total, count = total + np.log(bottom), count + 1
    actual = session_contrast(
      jnp.asarray(q, jnp.float32),
      jnp.asarray(d, jnp.float32),
      is_positive=jnp.asarray(positive),
      is_trained=jnp.asarray(trained),
      is_present=jnp.asarray(present),
      is_same=jnp.asarray(ids[:, None] == ids[None]),
      session_id=jnp.asarray(qid, jnp.int32) if session else None,
      config=config,
    )
    np.testing.assert_allclose(actual, (total, count), rtol=1e-4)
    self.assertGreater(count, 1)

  def test_one_session_alone_has_no_loss(self):
    this, batch = case(), toy.make_batch()
    one = batch.replace(
      groups=batch.groups | {"query": jnp.zeros(batch.size, jnp.int32)}
    )
    self.assertEqual(this.gradients(this.state, one)[0]["sqdc"][0], 0.0)
    total, count = this.gradients(this.state, batch)[0]["sqdc"]
    self.assertGreater(total, 0.0)
    self.assertEqual(count, batch.labels["click"].sum())

  def test_content_is_compared_with_ids(self):
    this = case(contrast(weight=0.0, id_weight=0.5))
    terms, grads = this.gradients(this.state, toy.make_batch())
    self.assertGreater(terms["cic"][0], 0.0)
    self.assertTrue(jnp.any(grads["params"]["id_projection"]["kernel"] != 0))


class SchemaTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"query_features": ("titel",)}, "'titel' is no text.*mean 'title'"),
    ({"query_features": ()}, "contrast.weight needs the text of a query"),
    ({"backward_rate": 0.5, "forward_rate": 0.2}, "backward_rate must be at m"),
    ({"bank": False, "backward_rate": 0.2}, "bank=False has no stored"),
    ({"tasks": ("play_time",)}, "'play_time'.*must be binary"),
    ({"encoder": {"dim": 9}}, r"encoder.dim \(9\) must be a multiple"),
    ({"contrast": {"negatives": "all"}}, "contrast.negatives 'all'"),
    ({"bank_dtype": "float16"}, "bank_dtype 'float16'"),
  )
  def test_mistakes(self, words, message):
    with self.assertRaisesRegex(UserError, message):
      jax.eval_shape(make_method(**words).init, jax.random.key(0))

  @parameterized.parameters(
    ({"query": None}, "session_mask needs roles.query"),
    ({"item": None}, "needs the document's id"),
  )
  def test_roles(self, roles, message):
    roles = dataclasses.replace(toy.SCHEMA.roles, **roles)
    schema = dataclasses.replace(toy.SCHEMA, roles=roles)
    with self.assertRaisesRegex(UserError, message):
      jax.eval_shape(make_method(schema).init, jax.random.key(0))

  @parameterized.parameters(
    ({"bank": False}, "decode_history_3"),
    ({"memory_lengths": (2,)}, "decode_history_3"),
    ({"query_features": (), "contrast": {"weight": 0.0}}, "query_encoder"),
  )
  def test_a_part_that_is_left_out_has_no_parameters(self, words, part):
    full, _ = jax.eval_shape(make_method().init, jax.random.key(0))
    self.assertIn(part, full)
    params, _ = jax.eval_shape(make_method(**words).init, jax.random.key(0))
    self.assertNotIn(part, params)


class FlopsTest(absltest.TestCase):
  def test_the_encoders_cost_is_that_of_their_products(self):
    method = make_method(
      encoder={"dim": 16, "num_heads": 2, "document_layers": 3, "mlp_dim": 64},
    )
    counted = flops.count_flops(method).under("Model/document_encoder")
    # [CLS] and four tokens: projections, scores and sums, two dense layers; of
    # the last layer keys and values alone but at CLS.
    dim, length = 16, 5

    def layer(n):
      dense = 2 * length * dim**2 + 2 * n * dim**2 + 2 * n * dim * 64
      return 2 * (dense + 2 * n * length * dim)

    products = 2 * layer(length) + layer(1)
    self.assertBetween(counted, products, 1.35 * products)

  def test_a_sample_saves_the_forward_and_the_backward_pass_apart(self):
    # The paper's table: 100/100, 100/20 and 20/20 % differ by 0.8 of a
    # backward and 0.8 of a forward pass of the document's encoder.
    def step_flops(forward, backward):
      method = make_method(
        encoder={
          "dim": 64,
          "num_heads": 2,
          "document_layers": 4,
          "mlp_dim": 256,
        },
        forward_rate=forward,
        backward_rate=backward,
      )
      config = train_state.StepConfig(method, method.stages[0], OPTIMIZER, 10)
      state = jax.eval_shape(
        functools.partial(train_state.init_state, config=config),
        jax.random.key(0),
      )
      step = functools.partial(train_state.train_step, config=config)
      batch = toy.make_batch(size=20)
      return jax.jit(step).lower(state, batch).cost_analysis()["flops"]

    everything = step_flops(1.0, 1.0)
    forward_only, sampled = step_flops(1.0, 0.2), step_flops(0.2, 0.2)
    encoder_backward = (everything - forward_only) / 0.8
    encoder_forward = (forward_only - sampled) / 0.8
    # A way back is two products for each of the way there.
    self.assertBetween(encoder_backward / encoder_forward, 1.7, 2.3)
    self.assertLess(sampled, 0.65 * everything)


if __name__ == "__main__":
  absltest.main()
