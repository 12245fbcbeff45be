from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import toy
from absl.testing import absltest, parameterized

from recjax import parallel
from recjax.sparse import table as table_lib
from recjax.sparse.table import Table


class TableTest(parameterized.TestCase):
  @parameterized.parameters((1, 64), (64, 64), (65, 128), (100, 128))
  def test_physical_rows_are_padded(self, num_rows, expected):
    self.assertEqual(Table(num_rows, 3, in_model=True).shape, (expected, 3))

  def test_features_of_one_vocabulary_share_rows(self):
    table = table_lib.embedding_table(toy.SCHEMA, 4, init_scale=0.5)
    self.assertEqual(
      table.first_row,
      {"user_id": 0, "item_id": 50, "tags": 90, "history": 50, "tab": 97},
    )
    self.assertEqual(table.num_rows, 50 + 40 + 7 + 3)
    self.assertEqual(table.init_scale, 0.5)

  def test_wrong_declarations_raise(self):
    with self.assertRaisesRegex(ValueError, "float32 or bfloat16.*float16"):
      Table(8, 2, in_model=True, dtype="float16")
    with self.assertRaisesRegex(ValueError, "by features.*or inside"):
      Table(8, 2)
    with self.assertRaisesRegex(ValueError, "by features.*or inside"):
      Table(8, 2, first_row={"item_id": 0}, in_model=True)

  def test_initial_values(self):
    table = Table(5000, 4, in_model=True, init_scale=0.3)
    values = np.asarray(table_lib.init_table(jax.random.key(0), table))
    self.assertEqual(values.shape, table.shape)
    np.testing.assert_allclose(values[:5000].std(), 0.3, rtol=0.03)
    np.testing.assert_allclose(values[:5000].mean(), 0.0, atol=0.01)
    np.testing.assert_array_equal(values[5000:], 0.0)
    self.assertGreater(np.abs(values[:5000]).min(axis=1).min(), 0.0)

  def test_a_large_table_is_filled_in_parts(self):
    table = Table(1000, 6, in_model=True, init_scale=0.3)
    with mock.patch.object(table_lib, "MAX_INIT_SIZE", 2100):
      values = np.asarray(table_lib.init_table(jax.random.key(0), table))
    np.testing.assert_array_equal(values[1000:], 0.0)
    # All parts are there, and no two are alike.
    correlation = np.corrcoef(values[:1000].T)
    np.testing.assert_allclose(correlation, np.eye(6), atol=0.15)
    np.testing.assert_allclose(values[:1000].std(axis=0), 0.3, rtol=0.1)

  def test_filling_takes_little_more_than_the_table(self):
    table = Table(2**20, 128, in_model=True)
    with mock.patch.object(table_lib, "MAX_INIT_SIZE", 2**22):
      memory = self._compile_init(table, parallel.Config()).memory_analysis()
    self.assertEqual(memory.output_size_in_bytes, 2**29)
    self.assertLess(memory.temp_size_in_bytes, 2**28)

  def test_a_sharded_table_is_filled_where_it_lives(self):
    table = Table(2**20, 128, in_model=True)
    config = parallel.Config(data=2, model=4)
    with mock.patch.object(table_lib, "MAX_INIT_SIZE", 2**22):
      compiled = self._compile_init(table, config)
    self.assertNotIn("all-gather", compiled.as_text())
    memory = compiled.memory_analysis()
    self.assertEqual(memory.output_size_in_bytes, 2**27)
    self.assertLess(memory.temp_size_in_bytes, 2**27)

  def _compile_init(self, table, config):
    mesh = parallel.make_mesh(config)
    rows = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(parallel.MODEL)
    )
    init = jax.jit(lambda k: table_lib.init_table(k, table), out_shardings=rows)
    return init.lower(jax.random.key(0)).compile()

  @parameterized.parameters("float32", "bfloat16")
  def test_storage_round_trip(self, dtype):
    table = Table(64, 3, in_model=True, dtype=dtype)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), "float32")
    stored = table_lib.to_storage(rows, table)
    self.assertEqual(stored.dtype, table.storage_dtype)
    read = table_lib.from_storage(stored, table)
    self.assertEqual(read.dtype, jnp.float32)
    np.testing.assert_array_equal(read, rows.astype(dtype).astype("float32"))
    np.testing.assert_array_equal(table_lib.to_storage(read, table), stored)


class GatherTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16")
  def test_equals_indexing_and_zeros_out_of_range(self, dtype):
    table = Table(64, 3, in_model=True, dtype=dtype)
    values = table_lib.init_table(jax.random.key(1), table)
    plain = np.asarray(table_lib.from_storage(values, table))
    ids = np.array([[5, 63, 5], [64, -1, 1 << 30]], np.int32)
    rows = table_lib.gather(values, jnp.asarray(ids), table)
    np.testing.assert_array_equal(rows[0], plain[ids[0]])
    np.testing.assert_array_equal(rows[1], np.zeros((3, 3)))

  def test_feature_ids_and_split_rows_are_inverse(self):
    table = table_lib.embedding_table(toy.SCHEMA, 2)
    values = table_lib.init_table(jax.random.key(0), table)
    batch = toy.make_batch(seed=3, size=6, num_padding=2)
    flat = table_lib.gather(values, table_lib.feature_ids(table, batch), table)
    rows = table_lib.split_rows(flat, table, batch)
    self.assertEqual(list(rows), list(table.first_row))
    for name, first_row in table.first_row.items():
      ids = np.asarray(batch.ids[name])
      mask = np.asarray(batch.id_mask.get(name, batch.example_mask))
      expected = np.asarray(values)[ids + first_row] * mask[..., None]
      np.testing.assert_array_equal(rows[name], expected)

  def test_masked_positions_and_padding_name_no_row(self):
    table = table_lib.embedding_table(toy.SCHEMA, 2)
    batch = toy.make_batch(seed=3, size=6, num_padding=2)
    # A pipeline that leaves the masks of padding on must not matter.
    history = jnp.ones_like(batch.id_mask["history"])
    history = history.at[:, 2].set(False)
    batch = batch.replace(id_mask={**batch.id_mask, "history": history})
    flat = np.asarray(table_lib.feature_ids(table, batch))
    place = 0
    for name, first_row in table.first_row.items():
      ids = np.asarray(batch.ids[name])
      mask = np.asarray(batch.id_mask.get(name, batch.example_mask)).copy()
      mask[4:] = False
      part = flat[place : place + ids.size].reshape(ids.shape)
      np.testing.assert_array_equal(part[mask], ids[mask] + first_row)
      self.assertTrue((part[~mask] >= table.shape[0]).all())
      place += ids.size
    self.assertEqual(place, flat.size)


if __name__ == "__main__":
  absltest.main()
