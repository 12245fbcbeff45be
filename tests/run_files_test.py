"""The files of a workdir, and the counts in `result.json`."""

import json
from unittest import mock

import jax
import ml_collections
import numpy as np
import sklearn.metrics
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax import run_files, train
from recjax.errors import UserError
from tests import run_case, toy

KEYS = (
  "model",
  "dataset",
  "seed",
  "steps",
  "best_step",
  "metrics",
  "examples_per_sec",
  "params",
  "flops_per_example",
)


class FilesOfARunTest(run_case.RunTestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = run_case.shared_directory() / "files"
    cls.config = run_case.make_config(model__tasks=["click", "secs"])
    cls.result = train.train_and_evaluate(
      cls.config, str(cls.workdir), commit="abc123"
    )

  def read(self, name):
    return json.loads((self.workdir / name).read_text())

  def test_everything_is_there(self):
    names = {path.name for path in self.workdir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    self.assertLen(events, 1)
    self.assertEqual(
      names - events,
      {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "predictions.npz",
        "diagnostics.json",
        "result.json",
      },
    )

  def test_the_config_is_kept_with_the_commit(self):
    self.assertEqual(
      self.read("config.json"), {**self.config, "commit": "abc123"}
    )
    self.assertRegex(run_files.git_commit(), "^(unknown|[0-9a-f]{7,}.*)$")

  def test_the_result_has_its_keys(self):
    result = self.read("result.json")
    self.assertCountEqual(result, KEYS)
    self.assertEqual(result, self.result)
    self.assertEqual(
      [result["model"], result["dataset"], result["seed"], result["steps"]],
      ["dlrm_mlp", "table", 3, 12],
    )
    self.assertCountEqual(result["params"], ["dense", "sparse", "active"])
    self.assertGreater(result["examples_per_sec"], 0)
    for name in ("test/click/auc", "test/click/gauc", "test/secs/rmse"):
      self.assertIn(name, result["metrics"])
    self.assertIn("valid/click/auc", result["metrics"])

  def test_the_predictions_give_the_metrics(self):
    with np.load(self.workdir / "predictions.npz") as file:
      arrays = dict(file)
    self.assertCountEqual(
      arrays,
      ["click/score", "click/label", "secs/score", "secs/label", "group"],
    )
    for array in arrays.values():
      self.assertLen(array, run_case.ROWS["test"])
    metrics = self.result["metrics"]
    auc = sklearn.metrics.roc_auc_score(
      arrays["click/label"], arrays["click/score"]
    )
    self.assertAlmostEqual(metrics["test/click/auc"], auc, places=6)
    seen = np.isfinite(arrays["secs/label"])
    error = arrays["secs/score"][seen] - arrays["secs/label"][seen]
    self.assertAlmostEqual(
      metrics["test/secs/rmse"], np.sqrt((error**2).mean()), places=4
    )

  def test_the_diagnostics_are_those_of_the_test_part(self):
    curve = self.read("diagnostics.json")["reliability"]["click"]
    self.assertEqual(sum(curve["count"]), run_case.ROWS["test"])
    self.assertEqual(list(self.read("diagnostics.json")["slot_usage"]), [])

  def test_lines_are_in_the_order_of_steps(self):
    lines = self.lines(self.workdir)
    steps = [line["step"] for line in lines]
    self.assertEqual(steps, [4, 4, 8, 8, 12, 12, 12])
    self.assertIn("test/click/auc", lines[-1])

  def test_a_finished_run_is_not_run_again(self):
    before = {p: p.stat().st_mtime_ns for p in self.workdir.rglob("*")}
    trainer = train.Trainer(self.config, str(self.workdir))
    with mock.patch.object(train.Trainer, "_start", side_effect=AssertionError):
      self.assertEqual(trainer.run(), self.result)
    after = {p: p.stat().st_mtime_ns for p in self.workdir.rglob("*")}
    self.assertEqual(after, before)

  def test_another_config_is_refused(self):
    other = run_case.changed(self.config, optimizer={"learning_rate": 0.5})
    with self.assertRaisesRegex(
      UserError, "another config.*learning_rate.*0.02.*learning_rate.*0.5"
    ) as caught:
      train.train_and_evaluate(other, str(self.workdir))
    self.assertNotIn("\n", str(caught.exception))
    self.assertEqual(self.read("result.json"), self.result)

  def test_another_place_is_the_same_run(self):
    moved = {**self.config, "parallel": {"data": 2}}
    result = train.train_and_evaluate(moved, str(self.workdir))
    self.assertEqual(result, self.result)

  def test_a_mistake_does_not_take_the_workdir(self):
    for wrong, message in (
      (run_case.make_config(data__path="missing.parquet"), "missing.parquet"),
      (run_case.make_config(model__tasks=["clik"]), "clik"),
      (run_case.make_config(model__embed=4), "embed"),
      (run_case.make_config(train__batch=4), "train.batch"),
    ):
      with self.assertRaisesRegex(UserError, message):
        train.Trainer(wrong, str(self.directory / "run"))
      self.assertFalse((self.directory / "run" / "config.json").exists())

  def test_a_workdir_that_cannot_be_made_is_a_user_error(self):
    (self.directory / "file").write_text("")
    with self.assertRaisesRegex(UserError, "cannot be made.*--workdir"):
      train.Trainer(self.config, str(self.directory / "file" / "run"))


class CheckBlocksTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"model": {}}, "config.model_name is missing"),
    ({"model_name": "msn"}, "config.data is missing"),
    ({"model_name": "msn", "data": {"path": "x"}}, "data.name is missing"),
    (
      {"model_name": "msn", "data": {"name": "table"}, "trian": {}},
      "unknown key config.trian.*train",
    ),
    (
      {"model_name": "msn", "data": {"name": "table"}, "train": 3},
      "config.train must be a block",
    ),
    (
      {"model_name": "msn", "data": {"name": "table"}, "seed": -1},
      "config.seed must be a whole number from 0 .*got -1",
    ),
    (
      {"model_name": "msn", "data": {"name": "table"}, "seed": True},
      "config.seed must be a whole number from 0 .*got True",
    ),
    (
      {"model_name": "msn", "data": {"name": "table"}, "model": {"x": {1: 2j}}},
      "config: 2j is no plain value",
    ),
  )
  def test_mistakes_are_user_errors(self, config, message):
    with self.assertRaisesRegex(UserError, message):
      run_files.check_blocks(config)

  def test_the_copy_is_plain_and_complete(self):
    config = ml_collections.ConfigDict(
      {
        "model_name": "msn",
        "data": {"name": "table"},
        "model": {"dims": (1, 2)},
      }
    )
    self.assertEqual(
      run_files.check_blocks(config.to_dict()),
      {
        "model_name": "msn",
        "seed": 0,
        "data": {"name": "table"},
        "model": {"dims": [1, 2]},
        "optimizer": {},
        "train": {},
        "parallel": {},
      },
    )


class CountsTest(parameterized.TestCase):
  @parameterized.parameters("none", "dot")
  def test_dlrm_by_hand(self, interaction):
    dims, embed = (256, 128), 16
    method = method_lib.load(
      "dlrm_mlp",
      {
        "tasks": ["click", "like"],
        "mlp_dims": dims,
        "embed_dim": embed,
        "interaction": interaction,
      },
      toy.SCHEMA,
    )
    # Five pooled embeddings, two numbers, a vector of three.
    width, multiplies, dense = 5 * embed + 2 + 3, 0, 0
    if interaction == "dot":
      multiplies += 2 * embed + 6 * 6 * embed
      dense += 2 * embed + embed
      width += 6 * 5 // 2
    for out in dims:
      multiplies += width * out
      dense += width * out + out
      width = out
    multiplies += 2 * width
    dense += 2 * (width + 1)
    # user, item and tab; three tags, five of a history.
    ids_read = 3 + 3 + 5
    self.assertEqual(
      run_files.count_params(method),
      {
        "dense": dense,
        "sparse": toy.NUM_IDS * embed,
        "active": dense + ids_read * embed,
      },
    )
    flops = run_files.count_flops(method)
    self.assertBetween(flops, 2 * multiplies, 1.02 * 2 * multiplies)
    self.assertAlmostEqual(
      run_files.count_flops(method, 8) / flops, 1, delta=0.01
    )

  def test_memory_slots_that_are_read_are_active(self):
    memory = {"num_keys": 8, "key_dim": 4, "top_k": 3}
    config = {
      "embed_dim": 4,
      "num_tokens": 2,
      "token_dim": 8,
      "num_layers": 1,
      "memory_layers": [0],
      "memory": memory,
    }
    method = method_lib.load("msn", config, toy.SCHEMA)
    counts = run_files.count_params(method)
    params, tables = jax.eval_shape(method.init, jax.random.key(0))
    dense = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertEqual(counts["dense"], dense)
    (name,) = (n for n, t in method.tables.items() if t.in_model)
    table = method.tables[name]
    self.assertGreaterEqual(tables[name].shape[0], table.num_rows)
    self.assertEqual(
      counts["sparse"],
      toy.NUM_IDS * 4 + table.num_rows * table.dim,
    )
    slots, rest = divmod(
      counts["active"] - dense - 11 * 4, memory["top_k"] * table.dim
    )
    self.assertEqual(rest, 0)
    self.assertGreater(slots, 0)
    self.assertLess(counts["active"], counts["dense"] + counts["sparse"])


if __name__ == "__main__":
  absltest.main()
