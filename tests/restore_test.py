import json
import shutil

from absl.testing import absltest, parameterized

from recjax import restore
from recjax.errors import UserError
from tests import run_case


class RestoreTest(run_case.RunTestCase):
  def evaluate(self, split="test", **options):
    run = restore.open_run(str(self.directory / "run"), **options)
    return run, restore.evaluate_run(run, split)

  def test_numbers_equal_those_of_the_run(self):
    # So high a rate that the last value is not the best.
    monitor = "valid/click/logloss"
    config = run_case.make_config(
      optimizer__learning_rate=0.3,
      optimizer__ema_decay=0.5,
      train__monitor=monitor,
    )
    result = self.run_once(config)
    self.assertLess(result["best_step"], result["steps"])

    run, metrics = self.evaluate()
    expected = result["metrics"] | metrics
    self.assertEqual(expected, result["metrics"])
    self.assertNotEmpty(metrics)
    self.assertEqual(run.step, result["best_step"])
    self.assertEqual(
      self.evaluate("valid")[1][monitor], result["metrics"][monitor]
    )

    run, metrics = self.evaluate("valid", checkpoint="last")
    self.assertEqual(run.step, result["steps"])
    line = [line for line in self.lines() if monitor in line][-1]
    self.assertEqual(line, {"step": run.step} | metrics)
    self.assertIn("train/click/auc", self.evaluate("train")[1])

  @parameterized.named_parameters(
    ("_mesh", {"mode": "mesh", "data": 2, "model": 2}),
    ("_pmap", {"mode": "pmap", "data": 2}),
  )
  def test_a_run_on_several_devices(self, placement):
    result = self.run_once(run_case.make_config(parallel=placement))
    for one_device in (False, True):
      run, metrics = self.evaluate(one_device=one_device)
      for name, value in metrics.items():
        self.assertAlmostEqual(value, result["metrics"][name], 5, name)
      if one_device:
        self.assertEqual(run.placement.mesh.size, 1)

  def test_mistakes(self):
    workdir = self.directory / "run"

    def check(message, split="test", **options):
      with self.assertRaisesRegex(UserError, message) as caught:
        self.evaluate(split, **options)
      self.assertNotIn("\n", str(caught.exception))

    check("run: holds no run")
    self.assertFalse(workdir.exists())
    self.run_once(run_case.make_config())
    check("unknown checkpoint 'bets'; did you mean 'best'", checkpoint="bets")
    check("unknown split 'tset'; did you mean 'test'", split="tset")

    folder = workdir / "checkpoints"
    best = json.loads((workdir / "result.json").read_text())["best_step"]
    shutil.rmtree(folder / str(best))
    check(f"holds no checkpoint of step {best}")
    shutil.rmtree(folder)
    check("checkpoints are gone")
    self.assertFalse(folder.exists())
    (workdir / "result.json").unlink()
    check("the run is not finished")
    (workdir / "result.json").write_text('{"metrics": {}}')
    (workdir / "config.json").write_text('{"model_name": "lightgbm"}')
    check("is a run of LightGBM")
    (workdir / "config.json").write_text("{")
    check("config.json: is damaged")


if __name__ == "__main__":
  absltest.main()
