"""`experiments.sweep` as a command: mistakes, a real sweep, kill and resume."""

import json
import os
import subprocess
import sys
import time

import command_case
import pytest
from absl.testing import absltest, parameterized

# Two rows of two trials and one seed each.
REAL = """
from recjax.sweep import Model, Sweep

def get_sweep():
  def model(label, dims):
    config = {{
      "model_name": "dlrm_mlp",
      "model": {{"tasks": ["click"], "embed_dim": 4, "mlp_dims": [dims]}},
      "data": {data},
      "optimizer": {{"learning_rate": 0.01, "sparse": {{}}}},
      "train": {{
        "batch_size": 16, "num_train_steps": 24, "eval_every_steps": 4
      }},
    }}
    return Model(label, config, {{"optimizer.learning_rate": (0.01, {rate})}})

  return Sweep(
    (model("small", 4), model("large", 8)), "small", num_trials=2, seeds=(0,)
  )
"""
STUB = """
from recjax.sweep import Model, Sweep

def get_sweep():
  config = {{"model_name": "x", "model": {{"tasks": ["click"], "gain": 1.0}}}}
  config["model"]["end"] = {end!r}
  model = Model("a", config, trainer="tests.sweep_case:train")
  return Sweep((model,), {baseline!r}, seeds=(3,))
"""


class SweepCommandTest(command_case.CommandTestCase):
  def sweep(self, text, *options):
    path = self.directory / "mine.py"
    path.write_text(text)
    return self.run_command(
      "experiments.sweep",
      f"--sweep={path}",
      f"--workdir={self.workdir}",
      *options,
    )

  def test_prints_progress_table_and_folder(self):
    outcome = self.sweep(STUB.format(end="done", baseline="a"))
    self.assertEqual((outcome.code, outcome.stderr), (0, ""))
    first, *_, last = outcome.stdout.splitlines()
    self.assertRegex(first, r"^\[1/1\] a, seed 3: valid/click/auc 0.10000 in")
    self.assertIn("a (baseline)", outcome.stdout)
    self.assertEqual(last, f"Results: {self.workdir}/results")

  def test_a_trial_that_fails_is_named_in_one_line(self):
    outcome = self.sweep(STUB.format(end="mistake", baseline="a"))
    self.assert_mistake(outcome, "^error: a, seed 3: table.csv has no column")

  @parameterized.named_parameters(
    ("none", None, "--sweep and --workdir are needed"),
    ("folder", "", "mine.py: get_sweep.. must return a Sweep|defines no"),
    ("syntax", "x = 1\ny = (", "mine.py, line 2: SyntaxError.*correct"),
    ("bug", "x = 1\nx.y", "mine.py, line 2: AttributeError"),
    ("type", "get_sweep = dict", "get_sweep.. must return a Sweep, got {}"),
    (
      "label",
      STUB.format(end="done", baseline="b"),
      "mine.py: baseline 'b' is no label; known: a",
    ),
    (
      "recipe",
      "from experiments.sweeps import common\ncommon.model('a', 'nix:base')",
      "mine.py: a: there is no recipe 'nix' in experiments/configs",
    ),
    (
      "size",
      "from experiments.sweeps import common\ncommon.model('a', 'msn:bse')",
      "mine.py: .*'bse'.*mean 'base'",
    ),
  )
  def test_mistakes_in_a_file(self, text, message):
    if text is None:
      outcome = self.run_command("experiments.sweep")
    else:
      outcome = self.sweep(text)
    self.assert_mistake(outcome, message)
    self.assert_no_workdir()

  def test_too_many_processes(self):
    outcome = self.sweep(
      STUB.format(end="done", baseline="a"), "--num_processes=999"
    )
    self.assert_mistake(outcome, "num_processes is 999, but there are")
    self.assert_no_workdir()


class RealSweepTest(command_case.CommandTestCase):
  """Trains; in processes of its own, which have their own options of XLA."""

  def start(self, name, *options, rate=0.03):
    self.write_table()
    cache = command_case.shared_directory() / "data"
    data = {
      "name": "table",
      "path": str(self.directory / "log.parquet"),
      "schema": str(self.directory / "schema.json"),
      "cache_dir": str(cache),
    }
    path = self.directory / "mine.py"
    path.write_text(REAL.format(data=data, rate=rate))
    with (self.directory / f"{name}.log").open("a") as log:
      return subprocess.Popen(
        [
          *(sys.executable, "-m", "experiments.sweep"),
          *(f"--sweep={path}", f"--workdir={self.directory / name}"),
          *options,
        ],
        cwd=command_case.ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
        stdout=log,
        stderr=log,
      )

  def finish(self, name, *options, **values):
    code = self.start(name, *options, **values).wait()
    log = (self.directory / f"{name}.log").read_text()
    self.assertEqual(code, 0, log)
    return self.results(name), log

  def results(self, name):
    folder = self.directory / name / "results"
    return {path.name: path.read_bytes() for path in folder.iterdir()}

  def test_a_killed_sweep_ends_as_one_never_stopped(self):
    # The first trial of the second row is killed in the middle.
    process = self.start("killed")
    folder = self.directory / "killed" / "trials" / "large-0-0"
    end = time.monotonic() + 300
    # Those that are being written have longer names.
    while not any(p.name.isdigit() for p in folder.glob("checkpoints/*")):
      self.assertIsNone(process.poll())
      self.assertLess(time.monotonic(), end)
      time.sleep(0.01)
    process.kill()
    process.wait()
    self.assertFalse((folder / "result.json").exists())
    killed, log = self.finish("killed")
    self.assertIn("[2/6] 2 runs kept, done before", log)
    log = folder.parents[1] / "logs" / "large-0-0.log"
    self.assertIn("from step", log.read_text())
    whole, _ = self.finish("whole")
    self.assertEqual(killed, whole)
    self.assertEqual(
      set(whole),
      {"small-0.json", "large-0.json", "comparison.json", "sweep.json"},
    )
    about = json.loads(whole["sweep.json"])
    trials = about["models"]["small"]["trials"]
    rates = [t["words"]["optimizer.learning_rate"] for t in trials]
    self.assertEqual(rates, [0.01, 0.03])

  @pytest.mark.slow
  @absltest.skipIf(len(os.sched_getaffinity(0)) < 2, "needs two cores")
  def test_the_number_of_processes_changes_nothing(self):
    one, _ = self.finish("one")
    two, _ = self.finish("two", "--num_processes=2")
    self.assertEqual(one, two)

  @pytest.mark.slow
  def test_a_trial_that_diverges_is_ranked_last(self):
    results, log = self.finish("diverging", rate=1e30)
    about = json.loads(results["sweep.json"])["models"]["small"]
    self.assertEqual(about["chosen"], {"optimizer.learning_rate": 0.01})
    self.assertIn("is not finite at step", about["trials"][1]["failed"])
    self.assertIn("small, trial 2 of 2: failed: the loss", log)


if __name__ == "__main__":
  absltest.main()
