import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import serve, train_state
from recjax.errors import UserError
from tests import toy

NAMES = ("item_id", "tags", "price", "content")


def make(name, **config):
  method = method_lib.load(
    name, {"tasks": ("click",), "embed_dim": 4, **config}, toy.SCHEMA
  )
  step = train_state.StepConfig(
    method, method.stages[0], optimizer_lib.Config(ema_decay=0.9), num_steps=1
  )
  state = jax.jit(lambda rng: train_state.init_state(rng, step))
  return method, state(jax.random.key(0))


def make_user(seed=1, history=(3, 1, 2)):
  user = jax.tree.map(lambda x: x[:1], toy.make_batch(seed))
  ids = np.zeros((1, 5), np.int32)
  ids[0, : len(history)] = history
  mask = np.arange(5)[None] < len(history)
  return user.replace(
    ids=dict(user.ids) | {"history": jnp.asarray(ids)},
    id_mask=dict(user.id_mask) | {"history": jnp.asarray(mask)},
  )


class RankerTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.method, cls.state = make("dlrm_mlp", mlp_dims=(8,))
    cls.ranker = serve.Ranker(cls.method, NAMES)
    cls.candidates = toy.make_batch(7, size=6)

  def score(self, user_state):
    return self.ranker.score(self.state, user_state, self.candidates)["click"]

  def test_scores_use_the_averaged_parameters(self):
    user = make_user()
    before = self.score(self.ranker.encode_user(self.state, user))
    params = jax.tree.map(lambda x: x + 1.0, self.state.params)
    state = self.state.replace(params=params)
    after = self.ranker.score(
      state, self.ranker.encode_user(state, user), self.candidates
    )
    np.testing.assert_array_equal(before, after["click"])

  def test_what_the_user_batch_holds_of_a_candidate_is_ignored(self):
    user = make_user()
    other = make_user(seed=9)
    changed = user.replace(
      dense=user.dense.at[:, 1].set(99.0),
      ids=dict(user.ids) | {n: other.ids[n] for n in ("item_id", "tags")},
      id_mask=dict(user.id_mask) | {"tags": other.id_mask["tags"]},
      vectors=other.vectors,
    )
    first, second = (
      self.score(self.ranker.encode_user(self.state, u))
      for u in (user, changed)
    )
    np.testing.assert_array_equal(first, second)

  def test_the_history_counts(self):
    first, second = (
      self.score(self.ranker.encode_user(self.state, make_user(history=h)))
      for h in ((3, 1, 2), (3, 1))
    )
    self.assertGreater(np.abs(first - second).max(), 1e-6)

  @parameterized.parameters(((3, 1), (2, 7)), ((), (2,)), ((4,), ()))
  def test_appended_events_equal_encoding_anew(self, old, new):
    user_state = self.ranker.encode_user(self.state, make_user(history=old))
    user_state = self.ranker.append(
      self.state, user_state, {"history": jnp.asarray(new, jnp.int32)}
    )
    whole = self.ranker.encode_user(self.state, make_user(history=old + new))
    np.testing.assert_allclose(
      self.score(user_state), self.score(whole), rtol=1e-5, atol=1e-6
    )
    self.assertEqual(user_state.counts["history"], len(old + new))

  def test_a_list_that_outgrows_its_length_is_encoded_anew(self):
    user_state = self.ranker.encode_user(self.state, make_user())
    with self.assertRaisesRegex(UserError, "would hold 6 events and keeps 5"):
      self.ranker.append(
        self.state, user_state, {"history": jnp.arange(3, dtype=jnp.int32)}
      )

  def test_only_lists_of_the_user_grow(self):
    user_state = self.ranker.encode_user(self.state, make_user())
    for name in ("tags", "user_id", "histori"):
      with self.assertRaisesRegex(UserError, f"'{name}' is no list"):
        self.ranker.append(
          self.state, user_state, {name: jnp.zeros(1, jnp.int32)}
        )

  def test_a_model_with_an_encoder_says_that_it_cannot_append(self):
    method, state = make("din", attention_dims=(4,), mlp_dims=(8,))
    ranker = serve.Ranker(method, NAMES)
    with self.assertRaisesRegex(UserError, "din encodes .* call encode_user"):
      ranker.append(state, ranker.encode_user(state, make_user()), {})

  def test_mistakes_in_the_candidates_features(self):
    with self.assertRaisesRegex(UserError, "'item'; did you mean 'item_id'"):
      serve.Ranker(self.method, ("item",))
    method, _ = make("din", attention_dims=(4,), mlp_dims=(8,))
    with self.assertRaisesRegex(UserError, "'history' is a sequence"):
      serve.Ranker(method, ("history",))

  def test_a_user_is_one_example(self):
    with self.assertRaisesRegex(ValueError, "one example, got 16"):
      self.ranker.encode_user(self.state, toy.make_batch())


class UserCacheTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    method, state = make("dlrm_mlp", mlp_dims=(8,))
    ranker = serve.Ranker(method, NAMES)
    users = [make_user(seed) for seed in range(3)]
    cls.states = [ranker.encode_user(state, user) for user in users]
    cls.size = cls.states[0].nbytes

  def test_a_state_counts_all_its_arrays(self):
    leaves = jax.tree.leaves(self.states[0])
    self.assertEqual(self.size, sum(np.asarray(leaf).nbytes for leaf in leaves))
    self.assertGreater(self.size, 4 * 5 * 4)

  def test_drops_the_longest_unused_over_the_budget(self):
    cache, states = serve.UserCache(2 * self.size + 1), self.states
    cache.put("a", states[0])
    cache.put("b", states[1])
    self.assertIs(cache.get("a"), states[0])
    cache.put("c", states[2])
    self.assertIsNone(cache.get("b"))
    self.assertIs(cache.get("a"), states[0])
    self.assertIs(cache.get("c"), states[2])
    self.assertEqual((cache.nbytes, len(cache)), (2 * self.size, 2))

  def test_a_new_state_replaces_the_old(self):
    cache, states = serve.UserCache(2 * self.size + 1), self.states
    cache.put("a", states[0])
    cache.put("a", states[1])
    self.assertIs(cache.get("a"), states[1])
    self.assertEqual((cache.nbytes, len(cache)), (self.size, 1))
    cache.discard("a")
    self.assertEqual((cache.nbytes, len(cache)), (0, 0))

  def test_a_state_over_the_whole_budget_is_not_held(self):
    cache, states = serve.UserCache(self.size - 1), self.states
    self.assertIs(cache.put("a", states[0]), states[0])
    self.assertIsNone(cache.get("a"))
    self.assertEqual(cache.nbytes, 0)
    with self.assertRaisesRegex(ValueError, "max_bytes must be at least 1"):
      serve.UserCache(0)


if __name__ == "__main__":
  absltest.main()
