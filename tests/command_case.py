"""What the tests of commands share: a small table and cheap processes.

A process that imports JAX takes seconds to start. One server does so once and
forks for each command, before any device is touched: so each command has its
own flags, exit code and streams.
"""

import atexit
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import parameterized

ROOT = pathlib.Path(__file__).parents[1]
ROWS = {"train": 60, "valid": 30, "test": 30}
SCHEMA = {
  "features": {
    "user": {"kind": "sparse"},
    "item": {"kind": "sparse"},
    "genres": {
      "kind": "sparse",
      "multi": True,
      "separator": "|",
      "max_len": 3,
    },
    "history": {
      "kind": "sequence",
      "vocabulary": "item",
      "max_len": 4,
      "separator": " ",
    },
    "price": {"kind": "dense"},
    "content": {"kind": "vector", "dim": 2},
  },
  "labels": {"click": "binary", "secs": {"kind": "real", "unit": "s"}},
  "roles": {"user": "user", "item": "item", "group": "user"},
  "split": {"by": "column", "column": "part"},
}
_SERVER = """
import json, os, runpy, sys, traceback, warnings
import tests.conftest
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
for option in ("min_compile_time_secs", "min_entry_size_bytes"):
  jax.config.update("jax_persistent_cache_" + option, -1)
jax.config.update("jax_disable_most_optimizations", True)
import ml_collections.config_flags, recjax.report, recjax.train, tensorboardX
import experiments.door

def run(case):
  for number, path in ((1, case["stdout"]), (2, case["stderr"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.argv = case["argv"]
  code = 0
  try:
    exec(case["setup"], globals())
    runpy.run_module(case["argv"][0], run_name="__main__", alter_sys=True)
  except SystemExit as error:
    code = error.code
    if isinstance(code, str):
      print(code, file=sys.stderr)
      code = 1
  except BaseException:
    traceback.print_exc()
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code or 0)

# JAX warns of any fork; this process never runs anything with it.
warnings.simplefilter("ignore")
for line in sys.stdin:
  pid = os.fork()
  if not pid:
    run(json.loads(line))
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a command ended."""

  code: int
  stdout: str
  stderr: str


def rows(**columns):
  """Columns of a small table in which `click` can be learned."""
  rng, count = np.random.default_rng(0), sum(ROWS.values())
  user, item = rng.integers(0, 9, count), rng.integers(0, 11, count)
  words = lambda ids: [f"i{i}" for i in ids]  # noqa: E731
  data = {
    "part": np.repeat(list(ROWS), list(ROWS.values())),
    "user": [f"u{i}" for i in user],
    "item": words(item),
    "genres": ["|".join(words(range(i % 4))) for i in item],
    "history": [" ".join(words(rng.integers(0, 11, i % 6))) for i in user],
    "price": rng.normal(size=count),
    "content": rng.normal(size=(count, 2)).tolist(),
    "click": ((user + item) % 3 == 0).astype(np.int32),
    "secs": np.where(
      rng.random(count) < 0.2, np.nan, rng.exponential(9, count)
    ),
    **columns,
  }
  return {name: value for name, value in data.items() if value is not None}


def schema(**features):
  """`SCHEMA` with features changed or, where None, left out."""
  entries = {**SCHEMA["features"], **features}
  entries = {name: entry for name, entry in entries.items() if entry}
  return {**SCHEMA, "features": entries}


class CommandTestCase(parameterized.TestCase):
  """Runs commands in folders of their own."""

  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.workdir = self.directory / "run"

  def write_table(self, columns=None, schema=SCHEMA, name="log.parquet"):
    """Writes table and schema; returns the options that name them.

    `columns` and `schema` may also be the bytes of the files, or None for a
    table that is right.
    """
    path, schema_path = self.directory / name, self.directory / "schema.json"
    if isinstance(columns, bytes):
      path.write_bytes(columns)
    else:
      pq.write_table(pa.table(rows() if columns is None else columns), path)
    text = schema if isinstance(schema, bytes) else json.dumps(schema).encode()
    schema_path.write_bytes(text)
    return self.table_options(path, schema_path)

  def table_options(self, path, schema_path):
    """Options of a run on a user's own table."""
    return [
      "--config.data.name=table",
      f"--config.data.path={path}",
      f"--config.data.schema={schema_path}",
      *self.cache_options(),
    ]

  def cache_options(self):
    """Options that keep prepared data out of the home folder."""
    return [f"--config.data.cache_dir={shared_directory() / 'data'}"]

  def train(self, *options, recipe="rankmixer.py:tiny", setup=""):
    """`experiments.run` with a recipe, a workdir and a small batch."""
    return self.run_command(
      "experiments.run",
      f"--config=experiments/configs/{recipe}",
      f"--workdir={self.workdir}",
      "--config.train.batch_size=16",
      "--config.train.num_train_steps=4",
      "--config.train.eval_every_steps=2",
      *options,
      setup=setup,
    )

  def run_command(self, module, *options, setup=""):
    """`python -m module options`, after the lines of `setup`."""
    return _run([module, *map(str, options)], setup)

  def assert_mistake(self, outcome, message, *, num_notes=0):
    """Exit code 2 and one line, after at most `num_notes` lines of log."""
    *notes, last = outcome.stderr.splitlines() or [""]
    self.assertEqual(outcome.code, 2, outcome.stderr)
    self.assertNotIn("Traceback", outcome.stderr)
    self.assertRegex(last, "^error: ")
    self.assertRegex(last, message)
    self.assertLessEqual(len(notes), num_notes, outcome.stderr)
    for note in notes:
      self.assertRegex(note, r"^([IW]\d{4} |\w+: step \d)")
    self.assertLess(len(last), 700)

  def assert_no_workdir(self):
    """A mistake must not take the folder: the next try has another config."""
    self.assertFalse(self.workdir.exists(), sorted(self.workdir.rglob("*")))

  def snapshot(self):
    """All files under the test's folder and what they hold."""
    return {
      str(path): path.read_bytes()
      for path in self.directory.rglob("*")
      if path.is_file()
    }


@functools.cache
def shared_directory() -> pathlib.Path:
  """Holds prepared data and compiled programs while the tests run."""
  keeper = tempfile.TemporaryDirectory(prefix="recjax_commands_")
  shared_directory.keeper = keeper
  return pathlib.Path(keeper.name)


@functools.cache
def _server():
  server = subprocess.Popen(
    [sys.executable, "-c", _SERVER, str(shared_directory() / "programs")],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def stop():
    server.stdin.close()
    server.wait()
    server.stdout.close()

  atexit.register(stop)
  return server


def _run(argv, setup):
  server, folder = _server(), shared_directory()
  case = {"argv": argv, "setup": setup}
  case |= {name: str(folder / name) for name in ("stdout", "stderr")}
  server.stdin.write(json.dumps(case) + "\n")
  server.stdin.flush()
  code = int(server.stdout.readline())
  texts = [(folder / name).read_text() for name in ("stdout", "stderr")]
  return Outcome(code, *texts)
