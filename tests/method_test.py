"""Finding, binding and reading of method files."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from recjax import method as method_lib
from recjax.errors import UserError
from recjax.schema import Feature, Label, Schema
from tests import toy, toy_trial
from tests.model_cases import TINY as TINY_MODELS

TINY = {"tasks": ["click", "play_time"], "embed_dim": 4, "mlp_dims": [4]}


class MethodTest(absltest.TestCase):
  def test_names_are_the_files(self):
    names = method_lib.names()
    self.assertContainsSubset(["dlrm_mlp", "rankmixer", "msn"], names)
    for name in names:
      module = method_lib.find_module(name)
      self.assertEqual(module.__name__.rpartition(".")[2], name)
      for part in ("Config", "Model", "tables", "loss_fn"):
        self.assertTrue(hasattr(module, part), f"{name}.{part}")

  def test_mistakes_are_user_errors(self):
    for name, config, message in (
      ("msm", {}, "unknown model 'msm'.*did you mean 'msn'"),
      ("os.path", {}, "unknown model 'os.path'"),
      ("dlrm_mlp", {"embed": 3}, "config.model.embed.*embed_dim"),
      ("dlrm_mlp", {"tasks": ["clik"]}, "unknown label 'clik'.*'click'"),
      ("dlrm_mlp", {"tasks": "click"}, "config.model.tasks must be a list"),
    ):
      with self.assertRaisesRegex(UserError, message):
        method_lib.load(name, config, toy.SCHEMA)

  def test_a_wrong_stage_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "initialize_from.*'nothing'"):
      method_lib.Stage(initialize_from="nothing")

  def test_reads_the_rows_of_every_feature(self):
    method = method_lib.load("dlrm_mlp", TINY, toy.SCHEMA)
    batch = toy.make_batch(num_padding=4)
    table = method.tables["embedding"]
    values = np.arange(table.shape[0] * 4, dtype=np.float32).reshape(-1, 4) + 1
    flat = method.read({"embedding": jnp.asarray(values)}, batch)
    rows = method._split(flat, batch)["embedding"]
    self.assertCountEqual(rows, [f.name for f in toy.SCHEMA.id_features])
    for feature in toy.SCHEMA.id_features:
      mask = np.asarray(batch.example_mask)
      if feature.is_list:
        mask = np.asarray(batch.id_mask[feature.name])
      ids = np.asarray(batch.ids[feature.name])
      expected = values[ids + table.first_row[feature.name]] * mask[..., None]
      np.testing.assert_array_equal(rows[feature.name], expected)

  def test_every_method_reads_sides_as_it_reads_sequences(self):
    history = toy.SCHEMA.feature("history")
    sides = dataclasses.replace(
      history, time="history_at", side={"history_tab": "tab"}
    )
    schema = dataclasses.replace(
      toy.SCHEMA,
      features=tuple(
        sides if f.name == "history" else f for f in toy.SCHEMA.features
      ),
      roles=dataclasses.replace(toy.SCHEMA.roles, time="at"),
    )
    for name in method_lib.names():
      config, trial = dict(TINY_MODELS.get(name, {})), None
      if toy_trial.is_trial(name):
        trial = toy_trial.SCHEMA.trial
      else:
        config["tasks"] = ["click"]
      method, plain = (
        method_lib.load(name, config, dataclasses.replace(data, trial=trial))
        for data in (schema, toy.SCHEMA)
      )
      ids = method.ids(method_lib.empty_batch(schema, ("click",)))
      for table, found in plain.ids(
        method_lib.empty_batch(toy.SCHEMA, ("click",))
      ).items():
        # As many as the history's own, of rows that are there already where the
        # tab is read too; not in tables without it, nor in banks.
        read = plain.tables[table]
        reads = read.trained and "history" in read.first_row
        self.assertLen(ids[table], len(found) + reads * history.max_len)
        new = 3 if reads and "tab" not in read.first_row else 0
        self.assertEqual(method.tables[table].num_rows, read.num_rows + new)
      jax.eval_shape(method.init, jax.random.key(0))

  def test_empty_batch_has_the_structure_of_a_real_one(self):
    real = toy.make_batch(size=3).replace(groups={})
    empty = method_lib.empty_batch(toy.SCHEMA, tuple(real.labels), size=3)
    chex.assert_trees_all_equal_shapes_and_dtypes(real, empty)
    self.assertEqual(real.real_labels, empty.real_labels)
    self.assertFalse(bool(empty.example_mask.any()))

  def test_works_without_lists_vectors_and_numbers(self):
    schema = Schema(
      (Feature("item_id", "sparse"),),
      (Label("click"),),
      vocab_sizes={"item_id": 9},
    )
    method = method_lib.load("dlrm_mlp", {"mlp_dims": [4]}, schema)
    params, tables = jax.eval_shape(method.init, jax.random.key(0))
    self.assertEqual(params["mlp_0"]["kernel"].shape, (16, 4))
    self.assertEqual(tables["embedding"].shape, (64, 16))

  def test_a_declared_table_that_is_not_read_is_an_error(self):
    method = method_lib.load("msn", {"memory_layers": [0]}, toy.SCHEMA)
    tables = method.tables | {
      "memory_9/values": method.tables["memory_0/values"]
    }
    broken = dataclasses.replace(method)
    broken.__dict__["tables"] = tables
    with self.assertRaisesRegex(ValueError, "memory_9/values.*not read"):
      jax.eval_shape(broken.init, jax.random.key(0))


if __name__ == "__main__":
  absltest.main()
