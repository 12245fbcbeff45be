"""Workers: every way in which a run ends, and what becomes of the others."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from recjax import workers
from recjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CORES = os.sched_getaffinity(0)


class WorkersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def job(self, name, end="done", secs=0.0):
    config = {
      "label": name,
      "seed": 0,
      "model": {"tasks": ["click"], "gain": 1.0, "end": end, "secs": secs},
    }
    folder = self.folder / "runs" / name
    return workers.Job(
      f"the {name}", "tests.sweep_case:train", config, str(folder)
    )

  def run_jobs(self, *jobs, num_processes=1):
    shares = workers.core_shares(num_processes)
    with workers.Workers(shares, self.folder) as pool:
      return list(pool.run(jobs))

  def started(self):
    return (self.folder / "started").read_text().splitlines()

  def test_jobs_run_in_their_order_and_log_to_files(self):
    outcomes = self.run_jobs(
      self.job("a"), self.job("b", "diverged"), self.job("c")
    )
    self.assertEqual(
      [(o.job.name, o.diverged is None) for o in outcomes],
      [("the a", True), ("the b", False), ("the c", True)],
    )
    self.assertIn("not finite at step 7", outcomes[1].diverged)
    self.assertTrue((self.folder / "runs" / "a" / "result.json").exists())
    self.assertEqual(
      (self.folder / "logs" / "a.log").read_text(), "what a run prints\n"
    )

  def test_programs_are_kept_in_the_folder_or_where_the_user_says(self):
    name = "JAX_COMPILATION_CACHE_DIR"
    for place in (str(self.folder / "programs"), "/somewhere"):
      with mock.patch.dict(os.environ, {name: place}):
        if "programs" in place:
          del os.environ[name]
        self.run_jobs(self.job("a", "programs"))
      log = (self.folder / "logs" / "a.log").read_text()
      self.assertEqual(log.splitlines()[-1], place)

  @absltest.skipIf(len(CORES) < 2, "needs two cores")
  def test_several_at_a_time_each_on_its_own_cores(self):
    jobs = [self.job(name, secs=0.5) for name in "abcd"]
    outcomes = self.run_jobs(*jobs, num_processes=2)
    self.assertLen(outcomes, 4)
    cores = {line.split(maxsplit=1)[1] for line in self.started()}
    self.assertLen(cores, 2)
    self.assertEqual(os.sched_getaffinity(0), CORES)

  @parameterized.parameters(
    ("mistake", UserError, "^the b: table.csv has no column 'x'$"),
    ("killed", UserError, "^the b: its process ended with code -9.*memory"),
    ("bug", RuntimeError, "^the b:\nTraceback(.|\n)*a bug"),
    ("full", OSError, "No space left on device: '/disk/file'"),
    ("stopped", workers.Stopped, ""),
  )
  def test_the_first_that_fails_ends_the_work(self, end, kind, message):
    with self.assertRaisesRegex(kind, message):
      self.run_jobs(self.job("a"), self.job("b", end), self.job("c"))
    self.assertLen(self.started(), 2)

  @absltest.skipIf(len(CORES) < 2, "needs two cores")
  def test_the_others_are_told_to_save_and_end(self):
    start = time.monotonic()
    with self.assertRaisesRegex(UserError, "the b: table.csv"):
      # This trainer does not listen to SIGTERM and so ends at once.
      self.run_jobs(
        self.job("a", secs=300), self.job("b", "mistake"), num_processes=2
      )
    self.assertLess(time.monotonic() - start, 120)

  def test_too_many_processes_are_a_mistake(self):
    for number, message in ((0, "at least 1"), (4096, "there are .* cores")):
      with self.assertRaisesRegex(UserError, message):
        workers.core_shares(number)

  def test_a_worker_does_not_outlive_who_started_it(self):
    script = (
      "import pathlib\nfrom recjax import workers\n"
      f"job = workers.Job(*{tuple(self.job('a', secs=300))!r})\n"
      f"folder = pathlib.Path({str(self.folder)!r})\n"
      "with workers.Workers([None], folder) as pool:\n"
      "  print(pool._workers[0].process.pid, flush=True)\n"
      "  list(pool.run([job]))\n"
    )
    parent = subprocess.Popen(
      [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE
    )
    worker = int(parent.stdout.readline())
    self.wait_for(lambda: (self.folder / "started").exists())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    self.wait_for(lambda: not _is_alive(worker))

  def wait_for(self, condition, secs=60):
    end = time.monotonic() + secs
    while not condition():
      self.assertLess(time.monotonic(), end)
      time.sleep(0.05)


def _is_alive(pid):
  """Also False for one that only waits to be buried."""
  try:
    os.kill(pid, 0)
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1]
  except (ProcessLookupError, FileNotFoundError):
    return False
  return state.split()[0] != "Z"


if __name__ == "__main__":
  absltest.main()
