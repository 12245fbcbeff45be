import io
import json
import math
import os
import pathlib
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from tensorboardX.proto import event_pb2

from recjax import writer
from recjax.errors import UserError


def _events(workdir):
  """All events of a folder, read from the record format by hand."""
  events = []
  for path in sorted(pathlib.Path(workdir).glob("events.out.tfevents.*")):
    data, offset = path.read_bytes(), 0
    while offset < len(data):
      size = int.from_bytes(data[offset : offset + 8], "little")
      event = event_pb2.Event()
      event.ParseFromString(data[offset + 12 : offset + 12 + size])
      events.append(event)
      offset += 12 + size + 4
  return events


def _run(workdir, steps, start_step=0):
  with writer.Writer(workdir, start_step=start_step) as out:
    for step in steps:
      out.write_scalars(step, {"train/loss": np.float32(1 / step)})
      if step % 2 == 0:
        out.write_scalars(step, {"valid/click/auc": 0.5 + step / 100})
  return (pathlib.Path(workdir) / "metrics.jsonl").read_bytes()


def _folder(test):
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name)


class WriterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = _folder(self)
    self.metrics = self.workdir / "metrics.jsonl"

  def test_each_line_is_on_disk_before_the_next_call(self):
    out = writer.Writer(self.workdir)
    self.addCleanup(out.close)
    out.write_scalars(3, {"valid/click/auc": jnp.float32(0.5), "n": 7})
    self.assertEqual(
      self.metrics.read_text(), '{"step": 3, "valid/click/auc": 0.5, "n": 7}\n'
    )

  def test_every_line_is_strict_json_and_restores_what_is_not_finite(self):
    values = {"a": math.nan, "b": np.float32(np.inf), "c": -math.inf}
    with writer.Writer(self.workdir) as out:
      out.write_scalars(1, values | {"d": jnp.bfloat16(1.5)})

    def reject(token):
      raise AssertionError(token)

    (line,) = self.metrics.read_text().splitlines()
    entry = json.loads(line, parse_constant=reject)
    restored = [float(entry[name]) for name in "abcd"]
    np.testing.assert_array_equal(restored, [np.nan, np.inf, -np.inf, 1.5])

  def test_refuses_arrays_and_a_scalar_called_step(self):
    with writer.Writer(self.workdir) as out:
      with self.assertRaisesRegex(ValueError, "one number"):
        out.write_scalars(1, {"x": np.zeros(2)})
      with self.assertRaisesRegex(ValueError, "rename"):
        out.write_scalars(1, {"step": 2})
    self.assertEqual(self.metrics.read_text(), "")

  @parameterized.parameters(
    "", '{"step": 9, "train/lo', '{"st', '{"step": 7, "x": "\N{EURO SIGN}'
  )
  def test_resumed_run_equals_an_undisturbed_one(self, torn):
    undisturbed = _run(_folder(self), range(1, 13))
    _run(self.workdir, range(1, 9))
    with self.metrics.open("ab") as file:
      file.write(torn.encode()[:-1])  # The last one ends inside a character.
    resumed = _run(self.workdir, range(5, 13), start_step=4)
    self.assertEqual(resumed, undisturbed)
    self.assertEmpty(list(self.workdir.glob(".*tmp")))

  def test_torn_line_goes_even_if_nothing_else_is_cut(self):
    whole = _run(self.workdir, range(1, 5))
    with self.metrics.open("a") as file:
      file.write('{"step": 3')
    self.assertEqual(_run(self.workdir, (), start_step=4), whole)

  def test_complete_last_line_without_its_newline_stays(self):
    whole = _run(self.workdir, range(1, 5))
    self.metrics.write_bytes(whole[:-1])
    self.assertEqual(_run(self.workdir, (), start_step=4), whole)

  def test_fresh_run_drops_all_lines(self):
    _run(self.workdir, range(1, 5))
    self.assertEqual(_run(self.workdir, ()), b"")

  @parameterized.parameters("oops", "[1]", '{"step": "1"}', '{"loss": 1}')
  def test_damage_before_the_end_is_named(self, line):
    self.metrics.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with self.assertRaisesRegex(UserError, r"metrics\.jsonl, line 2: .*delete"):
      writer.Writer(self.workdir, start_step=3)

  def test_events_hold_scalars_and_histograms(self):
    with writer.Writer(self.workdir) as out:
      out.write_scalars(5, {"train/loss": 0.25, "bad": math.nan})
      out.write_histogram(5, "rows", jnp.array([1.0, 2.0, jnp.nan]))
      out.write_histogram(5, "none", np.full(2, np.inf))
      out.flush()
    values = {
      value.tag: value
      for event in _events(self.workdir)
      if event.step == 5
      for value in event.summary.value
    }
    self.assertSameElements(
      values,
      ["train/loss", "rows", "rows/num_nonfinite", "none/num_nonfinite"],
    )
    self.assertEqual(values["train/loss"].simple_value, 0.25)
    self.assertEqual(values["rows"].histo.num, 2)
    self.assertEqual(values["rows"].histo.sum, 3)
    self.assertEqual(values["rows/num_nonfinite"].simple_value, 1)

  def test_resumed_run_hides_later_events(self):
    _run(self.workdir, range(1, 4), start_step=40)
    starts = [
      event.step
      for event in _events(self.workdir)
      if event.WhichOneof("what") == "session_log"
      and event.session_log.status == event_pb2.SessionLog.START
    ]
    self.assertEqual(starts, [41])


class WriteJsonTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = _folder(self) / "a" / "r.json"

  def test_arrays_paths_and_special_numbers(self):
    data = {
      "array": jnp.arange(3),
      "nested": ({"x": np.float64("nan")}, [np.int64(2), None, True]),
      "path": self.path,
      1: jnp.bfloat16(0.5),
    }
    writer.write_json(self.path, data)
    self.assertEqual(
      json.loads(self.path.read_text()),
      {
        "array": [0, 1, 2],
        "nested": [{"x": "nan"}, [2, None, True]],
        "path": str(self.path),
        "1": 0.5,
      },
    )

  def test_failed_write_leaves_the_old_file(self):
    writer.write_json(self.path, {"a": 1})
    old = self.path.read_bytes()
    with self.assertRaisesRegex(TypeError, "set"):
      writer.write_json(self.path, {"a": {1, 2}})
    real = os.replace
    self.addCleanup(setattr, os, "replace", real)

    def fail(*unused_args):
      raise OSError("disk full")

    os.replace = fail
    with self.assertRaisesRegex(OSError, "disk full"):
      writer.write_json(self.path, {"a": 2})
    self.assertEqual(self.path.read_bytes(), old)
    self.assertLen(list(self.path.parent.iterdir()), 1)


class _Terminal(io.StringIO):
  def isatty(self):
    return True


class ProgressTest(absltest.TestCase):
  def test_pipe_gets_a_plain_line_every_ten_seconds_and_a_last_one(self):
    stream, now = io.StringIO(), [0.0]
    with writer.Progress(
      100, start_step=40, stream=stream, clock=lambda: now[0]
    ) as progress:
      for step in range(41, 101):
        now[0] += 0.5
        progress.update(step, num_examples=64, loss=1 / step)
    lines = stream.getvalue().splitlines()
    self.assertEqual(
      lines,
      [
        "train: step 60/100 | 128 examples/s | loss 0.0167 | 0:00:20 left",
        "train: step 80/100 | 128 examples/s | loss 0.0125 | 0:00:10 left",
        "train: step 100/100 | 128 examples/s | loss 0.0100 | 0:00:00 left",
      ],
    )

  def test_short_run_still_shows_its_end(self):
    stream, now = io.StringIO(), [0.0]
    with writer.Progress(
      9, stream=stream, description="msn", clock=lambda: now[0]
    ) as progress:
      now[0] = 2.0
      progress.update(3, num_examples=10)
    self.assertEqual(
      stream.getvalue(),
      "msn: step 3/9 | 5 examples/s | loss - | 0:00:04 left\n",
    )

  def test_pipe_never_gets_escape_sequences(self):
    os.environ["FORCE_COLOR"] = "1"
    self.addCleanup(os.environ.pop, "FORCE_COLOR")
    stream = io.StringIO()
    with writer.Progress(2, stream=stream) as progress:
      progress.update(2, num_examples=1, loss=0.5)
    self.assertIn("step 2/2", stream.getvalue())
    self.assertNotIn("\x1b", stream.getvalue())

  def test_terminal_gets_one_bar(self):
    stream, now = _Terminal(), [0.0]
    os.environ.update(TERM="xterm", COLUMNS="120")
    self.addCleanup(os.environ.pop, "COLUMNS")
    with writer.Progress(4, stream=stream, clock=lambda: now[0]) as progress:
      now[0] = 4.0
      progress.update(3, num_examples=4000, loss=0.25)
    text = stream.getvalue()
    self.assertIn("\x1b", text)
    self.assertIn("step 3/4 | 1,000 examples/s | loss 0.2500", text)

  def test_default_stream_is_standard_error(self):
    stream = io.StringIO()
    self.addCleanup(setattr, sys, "stderr", sys.stderr)
    sys.stderr = stream
    with writer.Progress(1) as progress:
      progress.update(1)
    self.assertIn("step 1/1", stream.getvalue())


if __name__ == "__main__":
  absltest.main()
