"""How commands end: help, flags, recipes, and a run on a user's own table."""

import json
import subprocess
import sys

import command_case
from absl.testing import absltest, parameterized

from recjax.writer import read_lines

RECIPE = "experiments/configs/rankmixer.py:tiny"


class DoorTest(command_case.CommandTestCase):
  def test_a_table_of_ones_own_from_the_command_line(self):
    options = [
      *self.write_table(),
      '--config.model.tasks=("click","secs")',
      "--config.optimizer.clip_norm=None",
      "--config.label=mine",
    ]
    outcome = self.train(*options)
    self.assertEqual(outcome.code, 0, outcome.stderr)
    self.assertIn("test/click/auc", outcome.stdout)
    self.assertIn("test/secs/rmse", outcome.stdout)
    # Of the libraries' notes, a hundred lines of them, none is shown.
    notes = outcome.stderr.splitlines()
    self.assertTrue(
      all(
        any(w in n for w in ("Prepar", "step 4/4", "padding")) for n in notes
      ),
      notes,
    )
    result = json.loads((self.workdir / "result.json").read_text())
    self.assertEqual(
      (result["model"], result["dataset"], result["steps"]),
      ("mine", "table", 4),
    )
    lines = read_lines(self.workdir / "metrics.jsonl")
    self.assertIn("valid/click/gauc", lines[0] | lines[1])
    config = json.loads((self.workdir / "config.json").read_text())
    self.assertEqual(config["model"]["tasks"], ["click", "secs"])
    self.assertIsNone(config["optimizer"]["clip_norm"])
    before = self.snapshot()
    again = self.train(*options)
    self.assertEqual(again.code, 0, again.stderr)
    self.assertEqual(again.stdout, outcome.stdout)
    self.assertEqual(self.snapshot(), before)

  def test_a_csv_table_with_a_space_and_an_equals_sign_in_its_path(self):
    options = self.write_table(
      b"part,u,x,y\n" + b"".join(
        b"%s,u%d,%d,%d\n" % (part, i % 3, i, i % 2)
        for part in (b"train", b"valid", b"test")
        for i in range(9)
      ),
      {
        "features": {"u": {"kind": "sparse"}, "x": {"kind": "dense"}},
        "labels": {"y": "binary"},
        "split": {"by": "column", "column": "part"},
      },
      name="my a=b log.csv",
    )  # fmt: skip
    outcome = self.train(
      *options,
      "--config.model.tasks=y",
      "--config.model.mlp_dims=(4,)",
      recipe="dlrm_mlp.py:tiny",
    )
    self.assertEqual(outcome.code, 0, outcome.stderr)
    self.assertIn("test/y/auc", outcome.stdout)

  @parameterized.parameters("run", "demo", "report")
  def test_help(self, name):
    for flag in ("--help", "--helpfull", "--helpshort"):
      outcome = self.run_command(f"experiments.{name}", flag)
      self.assertEqual((outcome.code, outcome.stderr), (0, ""))
      self.assertIn(f"python -m experiments.{name}", outcome.stdout)
      self.assertIn("--workdir" if name != "report" else "--runs",
                    outcome.stdout)  # fmt: skip
    self.assertEmpty(list(self.directory.iterdir()))

  def test_a_bug_keeps_its_stack_trace(self):
    outcome = self.train(
      *self.write_table(),
      setup="recjax.train.Trainer.run = lambda self: {}['bug']",
    )
    self.assertEqual(outcome.code, 1)
    self.assertIn("Traceback", outcome.stderr)

  def test_a_full_disk_while_running_is_one_line(self):
    outcome = self.train(
      *self.write_table(),
      setup="""
def fail(self):
  raise OSError(28, "No space left on device", "/disk/metrics.jsonl")
recjax.train.Trainer.run = fail
""",
    )
    self.assert_mistake(
      outcome, "/disk/metrics.jsonl: No space left.*make room", num_notes=2
    )

  @parameterized.parameters(("Event loop is closed", 0), ("mine", 1))
  def test_what_follows_from_a_failed_read_is_not_told(self, text, count):
    outcome = self.train(
      *self.write_table(),
      setup=f"""
class Late:
  def __del__(self):
    raise RuntimeError({text!r})
def fail(self):
  Late()
  raise recjax.train.UserError("damaged")
recjax.train.Trainer.run = fail
""",
    )
    self.assertEqual(outcome.code, 2)
    self.assertEqual(outcome.stderr.count("Traceback"), count)

  def test_a_locked_recipe_takes_its_own_keys_only(self):
    path = self.directory / "mine.py"
    path.write_text(
      "from experiments.configs import rankmixer\n"
      "get_config = lambda size='tiny': rankmixer.get_config(size).lock()\n"
    )
    flags = [f"--config={path}", f"--workdir={self.workdir}"]
    outcome = self.run_command(
      "experiments.run", *flags, "--config.train.keep_checkpoints=1"
    )
    self.assert_mistake(outcome, "locked.*keep_checkpoints.*without .lock")
    outcome = self.run_command(
      "experiments.run", *flags, "--config.model_name=x"
    )
    self.assert_mistake(outcome, "unknown model 'x'")

  @parameterized.named_parameters(
    ("flag", ["--confg=x"], "Unknown .*flag 'confg'.*config"),
    ("key", [f"--config={RECIPE}", "--config.sed=1"], "config.sed.*'seed'"),
    ("value", [f"--config={RECIPE}", "--config.seed=x"], "seed .*int.*'x'"),
    ("argument", [f"--config={RECIPE}", "seed=1"], "argument 'seed=1'"),
    (
      "data",
      [f"--config={RECIPE}", "--config.data.name=kuai"],
      "'kuai'.*did you mean 'kuairand'",
    ),
  )
  def test_in_a_process_of_its_own(self, options, message):
    done = subprocess.run(
      [sys.executable, "-m", "experiments.run", *options, "--workdir=x"],
      cwd=command_case.ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.stdout, "")
    self.assertLen(done.stderr.splitlines(), 1)
    outcome = command_case.Outcome(done.returncode, "", done.stderr)
    self.assert_mistake(outcome, message)
    self.assertFalse((command_case.ROOT / "x").exists())


if __name__ == "__main__":
  absltest.main()
