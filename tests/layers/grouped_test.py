import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.layers import grouped


class GroupedTest(parameterized.TestCase):
  @parameterized.parameters(
    (7, 3, 2), (64, 3, 8), (33, 50, 4), (1, 9, 32), (12, 1, 5), (16, 4, 16)
  )
  def test_every_example_has_one_place_in_a_block_of_its_group(
    self, batch, num_groups, block
  ):
    rng = np.random.default_rng(batch)
    for kind in range(3):
      group = rng.integers(num_groups, size=batch)
      if kind:  # All in one group, the first or the last.
        group[:] = (kind - 1) * (num_groups - 1)
      plan = jax.jit(
        functools.partial(
          grouped.sort_into_blocks, num_groups=num_groups, block=block
        )
      )(jnp.asarray(group))
      place, example = np.asarray(plan.place), np.asarray(plan.example)
      self.assertLen(np.unique(place), batch)
      np.testing.assert_array_equal(example[place], np.arange(batch))
      self.assertEqual(np.sum(example < batch), batch)
      np.testing.assert_array_equal(
        np.asarray(plan.group_id)[place // block], group
      )
      most = -(-batch // block) + num_groups
      self.assertLessEqual(len(plan.group_id), most)
      self.assertTrue(np.all(np.diff(plan.group_id) >= 0))

  def test_equals_a_loop_over_examples(self):
    """Values and gradients of weights and inputs, own weights a group."""
    rng = np.random.default_rng(0)
    group = rng.integers(5, size=41)
    group[group == 3] = 1  # One group without examples.
    x = jnp.asarray(rng.normal(size=(41, 6)), jnp.float32)
    module = grouped.GroupedFFN(5, 4, 7)
    blocks = grouped.sort_into_blocks(jnp.asarray(group), 5, block=8)
    params = module.init(
      jax.random.key(0), blocks.pack(x), blocks.group_id, train=False
    )
    params = jax.tree.map(
      lambda v: jnp.asarray(rng.normal(size=v.shape), jnp.float32), params
    )

    def by_blocks(params, x):
      packed = blocks.pack(x)
      y = module.apply(params, packed, blocks.group_id, train=False)
      return blocks.unpack(y)

    def by_rows(params, x):
      up, down = params["params"]["up"], params["params"]["down"]
      rows = []
      for b, g in enumerate(group):
        hidden = jax.nn.gelu(x[b] @ up["kernel"][g] + up["bias"][g, 0])
        rows.append(hidden @ down["kernel"][g] + down["bias"][g, 0])
      return jnp.stack(rows)

    outputs = []
    for f in (by_blocks, by_rows):
      value = jax.jit(f)(params, x)
      grads = jax.jit(
        jax.grad(lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))), argnums=(0, 1))
      )(params, x)
      outputs.append((value, grads))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
      *outputs,
    )

  def test_without_groups_block_i_has_weights_i(self):
    x = jnp.arange(12.0).reshape(3, 2, 2)
    kernel = jnp.arange(6.0).reshape(3, 2, 1)
    expected = np.stack([x[t] @ kernel[t] for t in range(3)])
    np.testing.assert_allclose(grouped.grouped_product(x, kernel), expected)


if __name__ == "__main__":
  absltest.main()
