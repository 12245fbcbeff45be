import functools
import json
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy
from absl.testing import absltest, parameterized

from recjax import export, export_golden
from recjax import method as method_lib
from recjax import scorer as scorer_lib
from recjax.errors import UserError
from tests import command_case, model_cases, run_case, toy, toy_trial

# Runs score.py as a machine without recjax would: nothing of it is imported.
_CHILD = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
packages = {name.partition(".")[0] for name in sys.modules}
assert not packages & {"recjax", "flax", "pyarrow", "safetensors"}, packages
"""


@functools.cache
def make_case(name):
  """A tiny method, random weights, and its artefact."""
  config = {
    "tasks": model_cases.TASKS,
    **model_cases.TINY.get(name, {}),
  }
  method = method_lib.load(name, config, toy.SCHEMA)
  rng = np.random.default_rng(0)
  # Compiling the method's own initialisation would take longest of all.
  params, tables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype),
    jax.eval_shape(method.init, jax.random.key(0)),
  )
  return method, params, tables, export.make_artefact(method, params, tables)


def arrays_of(batch):
  """What `scorer_lib.Encoder` gives for a batch."""
  arrays = {"dense": batch.dense, "example_mask": batch.example_mask}
  for kind in (
    "ids",
    "id_mask",
    "vectors",
    "event_age",
    "tokens",
    "token_mask",
  ):
    arrays |= {f"{kind}/{k}": v for k, v in getattr(batch, kind).items()}
  return arrays


class ArtefactTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (f"_{name}", name)
    for name in method_lib.names()
    if not toy_trial.is_trial(name)
  )
  def test_every_model_scores_the_same(self, name):
    method, params, tables, (program, weights) = make_case(name)
    program = jax.export.deserialize(program.serialize())
    self.assertCountEqual(program.platforms, ("cpu", "cuda", "tpu"))

    @jax.jit
    def predict(params, tables, batch):
      rows = method.read(tables, batch)
      return method.apply(params, tables, rows, batch, train=False)[0]

    batch = toy.make_batch(0, 8, num_padding=2)
    expected = predict(params, tables, batch)
    for size in (5, 8):
      short = jax.tree.map(lambda x, size=size: x[:size], batch)
      actual = program.call(weights, arrays_of(short))
      self.assertCountEqual(actual, model_cases.TASKS)
      valid = np.asarray(short.example_mask)
      for task, values in expected.items():
        self.assertGreater(np.ptp(values[:5]), 1e-3)
        np.testing.assert_allclose(
          np.asarray(actual[task])[valid],
          np.asarray(values)[:size][valid],
          rtol=1e-5,
          atol=1e-5,
        )

  def test_constant_keys_are_folded(self):
    _, params, _, (_, weights) = make_case("msn")
    self.assertIn("row_theta", params["memory_0"])
    self.assertIn("params/memory_0/row_keys", weights)
    self.assertNotIn("params/memory_0/row_theta", weights)

  def test_tensors_are_safetensors_and_aligned(self):
    rng = np.random.default_rng(0)
    tensors = {
      "a table": rng.normal(size=(64, 3)).astype(np.float32),
      "of/bits": rng.integers(0, 2**16, (128, 1)).astype(np.uint16),
      "keys": rng.integers(0, 2**63, 5).astype(np.uint64),
      "é": np.arange(4, dtype=np.int32),
      "none": np.zeros((0,), np.uint64),
    }
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "x.safetensors"
    export.write_tensors(path, tensors)
    mapped = scorer_lib.map_tensors(path)
    theirs = safetensors.numpy.load_file(path)
    for read in (mapped, theirs):
      self.assertCountEqual(read, tensors)
      for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)
        self.assertEqual(read[name].dtype, tensor.dtype)
    for name in ("a table", "of/bits"):
      self.assertEqual(mapped[name].ctypes.data % 64, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with self.assertRaisesRegex(ValueError, "cut off"):
      scorer_lib.map_tensors(path)


class ExportCommandTest(command_case.CommandTestCase):
  def score(self, folder, *options):
    """`score.py` in a process, and a folder, of its own."""
    return subprocess.run(
      [sys.executable, "-I", "-c", _CHILD, str(folder / "score.py"), *options],
      cwd=self.directory,
      env={"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )

  def test_a_table_scores_the_same_without_recjax(self):
    columns = command_case.rows()
    # In the test part alone: unseen ids, and missing and too many values.
    for name, values in {
      "user": ["new", None, "u1"],
      "item": ["i1", "", "neu ü"],
      "genres": ["i1|new", None, "|".join(f"i{i}" for i in range(7))],
      "history": [None, "new i1 i2 i3 i4 i5", " "],
      "price": [99.0, -99.0, 0.0],
    }.items():
      columns[name] = [*list(columns[name])[:-3], *values]
    # The history's events have times and sides; " " is two without an item.
    counts = [len(h.split(" ")) if h else 0 for h in columns["history"]]
    columns["history_at"] = [list(range(n)) for n in counts]
    columns["history_user"] = [[f"u{i}" for i in range(n)] for n in counts]
    columns["at"] = counts
    history = command_case.SCHEMA["features"]["history"]
    options = self.write_table(
      columns,
      command_case.schema(
        history=history
        | {"time": "history_at", "side": {"history_user": "user"}}
      )
      | {"roles": command_case.SCHEMA["roles"] | {"time": "at"}},
    )
    tasks = "--config.model.tasks=('click', 'secs')"
    self.assertEqual(self.train(*options, tasks).code, 0)
    result = json.loads((self.workdir / "result.json").read_text())

    evaluated = self.run_command(
      "experiments.evaluate",
      f"--workdir={self.workdir}",
      f"--output={self.directory / 'metrics.json'}",
    )
    self.assertEqual(evaluated.code, 0, evaluated.stderr)
    metrics = json.loads((self.directory / "metrics.json").read_text())
    self.assertEqual(metrics["step"], result["best_step"])
    self.assertEqual(
      metrics["metrics"],
      {k: v for k, v in result["metrics"].items() if k.startswith("test/")},
    )
    self.assertIn(
      f"test/click/auc {result['metrics']['test/click/auc']:.5f}",
      evaluated.stdout.splitlines(),
    )

    folder = self.directory / "exports/mine"
    exported = self.run_command(
      "experiments.export", f"--workdir={self.workdir}", f"--output={folder}"
    )
    self.assertEqual(exported.code, 0, exported.stderr)
    self.assertEqual(exported.stdout.split(), [str(folder)])
    golden = json.loads((folder / "golden.json").read_text())
    self.assertEqual(golden["columns"]["user"][-3:], ["new", None, "u1"])
    self.assert_arguments(json.loads((folder / "manifest.json").read_text()))

    checked = self.score(folder, "--check")
    self.assertEqual(checked.returncode, 0, checked.stderr)
    self.assertRegex(checked.stdout, "^30 rows, largest difference .*e-0[6-9]")
    self.assert_lines_equal_the_run(folder)
    self.assert_check_fails(folder, golden)

  def assert_arguments(self, manifest):
    names = [entry["name"] for entry in manifest["arguments"]]
    self.assertLen(names, manifest["num_arguments"])
    weights = names[: manifest["num_weights"]]
    self.assertEqual(weights, sorted(weights))
    self.assertIn("tables/embedding", weights)
    self.assertEqual(
      names[manifest["num_weights"] :],
      [
        "dense",
        "event_age/history",
        "example_mask",
        "id_mask/genres",
        "id_mask/history",
        "id_mask/history_user",
        "ids/genres",
        "ids/history",
        "ids/history_user",
        "ids/item",
        "ids/user",
        "vectors/content",
      ],
    )
    shapes = {e["name"]: e["shape"] for e in manifest["arguments"]}
    self.assertEqual(shapes["ids/history"], ["batch", 4])
    self.assertEqual(manifest["tasks"], {"click": "binary", "secs": "real"})
    self.assertEqual(manifest["units"], {"secs": "s"})

  def assert_lines_equal_the_run(self, folder):
    """All test rows of the source, against what the run itself wrote."""
    rows = pq.read_table(self.directory / "log.parquet").to_pylist()
    rows = [row for row in rows if row["part"] == "test"]
    path = self.directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = self.score(folder, f"--input={path}")
    self.assertEqual(scored.returncode, 0, scored.stderr)
    lines = [json.loads(line) for line in scored.stdout.splitlines()]
    with np.load(self.workdir / "predictions.npz") as stored:
      click = 1 / (1 + np.exp(-stored["click/score"]))
      secs = stored["secs/score"]
    np.testing.assert_allclose([v["click"] for v in lines], click, atol=1e-5)
    np.testing.assert_allclose([v["secs"] for v in lines], secs, atol=1e-5)

    del rows[3]["price"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = self.score(folder, f"--input={path}")
    self.assertEqual(scored.returncode, 2)
    self.assertRegex(scored.stderr, "^error: .*KeyError: 'price'")

  def assert_check_fails(self, folder, golden):
    golden["predictions"]["click"][2] += 1e-3
    (folder / "golden.json").write_text(json.dumps(golden))
    checked = self.score(folder, "--check")
    self.assertEqual(checked.returncode, 2)
    self.assertIn("1 rows differ by more than 1e-05", checked.stderr)
    self.assertEqual(
      self.score(folder, "--check", "--tolerance=1").returncode, 0
    )

  @parameterized.named_parameters(
    ("_export_nothing", "export", [], "--workdir and --output are needed"),
    ("_evaluate_nothing", "evaluate", [], "--workdir is missing"),
    ("_export_no_run", "export", ["workdir", "output"], "holds no run"),
    ("_evaluate_no_run", "evaluate", ["workdir"], "holds no run"),
    ("_export_exists", "export", ["workdir", "."], "exists; give another"),
    ("_evaluate_exists", "evaluate", ["workdir", "."], "exists; give another"),
  )
  def test_mistakes(self, command, options, message):
    given = {
      "workdir": f"--workdir={self.workdir}",
      "output": f"--output={self.directory / 'out'}",
      ".": f"--output={self.directory}",
    }
    before = self.snapshot()
    outcome = self.run_command(
      f"experiments.{command}", *(given[option] for option in options)
    )
    self.assert_mistake(outcome, message)
    self.assertEqual(self.snapshot(), before)
    self.assertFalse((self.directory / "out").exists())


class ExportRunTest(run_case.RunTestCase):
  def export(self):
    return export.export_run(
      str(self.directory / "run"), str(self.directory / "out")
    )

  def test_the_average_and_the_bits_of_a_memory(self):
    memory = {"num_keys": 6, "key_dim": 4, "top_k": 3}
    config = run_case.make_config("msn", optimizer__ema_decay=0.9)
    config["model"] |= {"num_tokens": 2, "token_dim": 8, "num_layers": 1}
    config["model"] |= {"memory_layers": [0]}
    config["model"] |= {"memory": memory | {"value_dtype": "bfloat16"}}
    self.run_once(config)
    folder = self.export()
    scorer = scorer_lib.Scorer(folder, max_batch_size=16)
    golden = json.loads((folder / "golden.json").read_text())
    self.assertLess(scorer.differences(golden).max(), 1e-5)
    tables = scorer_lib.map_tensors(folder / "tables.safetensors")
    self.assertEqual(tables["memory_0/values"].dtype, np.uint16)
    # Rows of several batches, and scores in their units.
    scores = scorer.score(golden["columns"])
    click = np.asarray(golden["predictions"]["click"])
    np.testing.assert_allclose(
      scores["click"], 1 / (1 + np.exp(-click)), atol=1e-5
    )
    none = scorer.score({name: [] for name in golden["columns"]})
    self.assertEqual(none["click"].shape, (0,))

    for name, message in (
      ("model.bin", "model.bin: cannot be read by JAX"),
      ("manifest.json", "no whole export"),
      ("tables.safetensors", "no whole export .*is cut off"),
    ):
      content = (folder / name).read_bytes()
      (folder / name).write_bytes(content[: len(content) // 2])
      with self.assertRaisesRegex(scorer_lib.InputError, message):
        scorer_lib.Scorer(folder)
      (folder / name).write_bytes(content)

  def test_changed_data_is_a_mistake(self):
    config = run_case.make_config()
    self.run_once(config)
    path = self.directory / "run/predictions.npz"
    with np.load(path) as stored:
      arrays = dict(stored)
    arrays["click/score"] = arrays["click/score"][::-1] + 1
    np.savez(path, **arrays)
    with self.assertRaisesRegex(UserError, "the data has changed"):
      self.export()
    self.assertFalse((self.directory / "out").exists())

  def test_only_a_search_may_leave_golden_rows_out(self):
    golden = {
      "tolerance": 0.1,
      "columns": {"a": list(range(20))},
      "predictions": {"click": [0.5] * 20},
    }
    scorer = mock.create_autospec(scorer_lib.Scorer, instance=True)
    scorer.differences.return_value = np.array([0.0] * 19 + [0.2])
    with self.assertRaisesRegex(RuntimeError, "differs .* by up to 2.0e-01"):
      export_golden.agreeing(golden, scorer, 1.0)
    kept = export_golden.agreeing(golden, scorer, 0.9)
    self.assertEqual(kept["columns"], {"a": list(range(19))})
    self.assertLen(kept["predictions"]["click"], 19)

  def test_an_export_that_differs_is_not_kept(self):
    self.run_once(run_case.make_config())
    wrong = lambda columns: (  # noqa: E731
      {**description(columns)[0], "dense": {"mean": [5.0], "std": [9.0]}},
      description(columns)[1],
    )
    description = export.describe_data
    self.enter_context(mock.patch.object(export, "describe_data", wrong))
    with self.assertRaisesRegex(RuntimeError, "differs from the model"):
      self.export()
    self.assertEqual([path.name for path in self.directory.iterdir()], ["run"])


if __name__ == "__main__":
  absltest.main()
