import sys
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.errors import UserError
from recjax.layers import attention
from recjax.layers.attention import KeysValues
from tests import oracles


def draw(num_queries=5, length=6, users=3, seed=0):
  rng = np.random.default_rng(seed)
  make = lambda n: jnp.asarray(rng.normal(size=(users, n, 2, 4)), jnp.float32)  # noqa: E731
  mask = rng.random((users, num_queries, length)) < 0.5
  mask[0] = False
  return make(num_queries), KeysValues(make(length), make(length)), mask


def oracle(query, user, mask):
  """One query and head at a time; zeros where nothing may be seen."""
  query, user = oracles.to_float64((query, user))
  found = np.zeros(query.shape)
  for u, q, h in np.ndindex(*query.shape[:3]):
    seen = np.asarray(mask)[u, q]
    if seen.any():
      scores = user.keys[u, seen, h] @ query[u, q, h] / 2
      found[u, q, h] = oracles.softmax(scores) @ user.values[u, seen, h]
  return found


class AttendTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2, 5, 9)
  def test_equals_loops(self, chunk):
    query, user, mask = draw()
    actual = jax.jit(lambda *args: attention.attend(*args, chunk=chunk))(
      query, user, jnp.asarray(mask)
    )
    np.testing.assert_allclose(
      actual, oracle(query, user, mask), rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(0, 2)
  def test_a_query_without_keys_is_zero_and_so_are_its_gradients(self, chunk):
    query, user, mask = draw()
    shared = jnp.asarray(mask[:, :1])

    def total(query, user):
      found = attention.attend(query, user, shared, chunk=chunk)
      return jnp.sum(found**2), found

    (_, found), grads = jax.jit(
      jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    )(query, user)
    chex.assert_tree_all_finite(grads)
    for x in (found, *jax.tree.leaves(grads)):
      self.assertFalse(x[0].any())
      self.assertTrue(x[1].any())

  def test_own_keys_share_one_softmax_with_those_of_the_user(self):
    query, user, mask = draw(num_queries=2, users=6)
    few = jax.tree.map(lambda x: x[::3], user)
    few_mask = jnp.asarray(mask[::3, :1])
    _, own, _ = draw(length=3, users=6, seed=1)
    found = jax.jit(attention.attend_beside)(query, few, few_mask, own)
    whole = KeysValues(
      *(
        jnp.concatenate([jnp.repeat(a, 3, axis=0), b], axis=1)
        for a, b in zip(few, own, strict=True)
      )
    )
    seen = np.repeat(np.asarray(few_mask), 3, axis=0)
    seen = np.concatenate([seen, np.ones((6, 1, 3), bool)], axis=2)
    expected = oracle(query, whole, np.repeat(seen, 2, axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def test_chunks_hold_fewer_scores(self):
    query, user, mask = draw(num_queries=256, length=256, users=2)

    def bytes_of(chunk):
      step = jax.jit(
        jax.grad(
          lambda q: attention.attend(
            q, user, jnp.asarray(mask[:, :1]), chunk=chunk
          ).sum()
        )
      )
      return step.lower(query).compile().memory_analysis().temp_size_in_bytes

    self.assertLess(bytes_of(16), bytes_of(0) / 3)

  def test_a_library_that_is_missing_is_named(self):
    with mock.patch.dict(sys.modules, {"tokamax": None}):
      with self.assertRaisesRegex(UserError, "needs the package tokamax.*xla"):
        attention.find("tokamax")

  def test_causal_masks_end_at_the_query(self):
    mask = jnp.asarray([[False, True, True, True]])
    seen = attention.key_mask(mask, 2, is_causal=True)
    np.testing.assert_array_equal(
      seen[0], [[False, True, True, False], [False, True, True, True]]
    )


if __name__ == "__main__":
  absltest.main()
