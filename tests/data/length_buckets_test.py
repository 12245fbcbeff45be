"""Batches by length hold every row once, whole and in few shapes."""

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from recjax import evaluate, parallel, train, train_state
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax.data import length_buckets, pipeline
from recjax.data.columns import Block, Columns, ColumnWriter
from recjax.errors import UserError
from recjax.schema import Feature, Label, Schema
from tests import command_case, run_case, toy

LENGTHS = np.random.default_rng(0).permutation(
  np.repeat([0, 1, 2, 3, 4, 5, 9, 30], [9, 11, 20, 7, 30, 3, 15, 8])
)
LIMITS = (2, 4, 16)
MAX_LEN = 20


def write_store(directory):
  """Rows whose `row` is their number and whose `long` has `LENGTHS` events."""
  schema = Schema(
    (
      Feature("row", "sparse"),
      Feature("long", "sequence", vocabulary="row", max_len=MAX_LEN),
      Feature("short", "sequence", vocabulary="row", max_len=3),
    ),
    (Label("y"),),
    vocab_sizes={"row": len(LENGTHS)},
  )
  writer = ColumnWriter(directory, schema)
  for name in ("long", "short"):
    writer.append_values(name, np.arange(len(LENGTHS)))
  rows = np.arange(len(LENGTHS))
  start = rows % 50
  writer.append(
    "train",
    Block(
      np.zeros((len(rows), 0), np.float32),
      {"row": rows},
      {"long": (start, LENGTHS), "short": (start, LENGTHS // 2)},
      {},
      {"y": rows % 2.0},
      {},
    ),
  )
  writer.finish(schema)


def rows_of(batches):
  return [b.ids["row"][b.example_mask].tolist() for b in batches]


class LengthBucketsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    write_store(self.directory)
    self.columns = Columns(self.directory)

  def load(self, **options):
    options = {
      "batch_size": 10,
      "shuffle": True,
      "length_buckets": LIMITS,
      **options,
    }
    return pipeline.make_loader(self.columns, "train", **options)

  @parameterized.product(shuffle=[True, False], num_threads=[0, 3])
  def test_an_epoch_has_every_row_once_and_loses_no_event(
    self, shuffle, num_threads
  ):
    batches = list(
      self.load(shuffle=shuffle, num_epochs=2, num_threads=num_threads)
    )
    buckets = length_buckets.LengthBuckets(self.columns, "train", 10, LIMITS)
    sizes = np.histogram(LENGTHS, [0, 3, 5, 17, 99])[0]
    self.assertEqual(buckets.num_steps, sum(-(-n // 10) for n in sizes))
    self.assertLen(batches, 2 * buckets.num_steps)
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
      rows = sum(rows_of(epoch), [])
      self.assertEqual(sorted(rows), list(range(len(LENGTHS))))
      if not shuffle:
        np.testing.assert_array_equal(rows, buckets.order)
    self.assertEqual(
      {b.ids["long"].shape for b in batches},
      {(10, width) for width in (2, 4, 16, 20)},
    )
    self.assertEqual(
      {b.ids["short"].shape for b in batches}, {(10, 2), (10, 3)}
    )
    for batch in batches:
      valid = batch.example_mask
      rows = batch.ids["row"][valid]
      whole = self.columns.read("train", rows)
      for name in ("long", "short"):
        width = batch.ids[name].shape[1]
        np.testing.assert_array_equal(
          batch.ids[name][valid], whole.ids[name][:, :width]
        )
        self.assertFalse(whole.id_mask[name][:, width:].any())

  def test_shuffled_epochs_and_seeds_differ(self):
    batches = rows_of(self.load(num_epochs=2, seed=1))
    half = len(batches) // 2
    self.assertNotEqual(batches[:half], batches[half:])
    self.assertNotEqual(batches, rows_of(self.load(num_epochs=2, seed=2)))
    self.assertEqual(batches, rows_of(self.load(num_epochs=2, seed=1)))
    # Buckets come mixed, not one after another.
    lengths = [LENGTHS[rows].max() for rows in batches[:half]]
    self.assertNotEqual(lengths, sorted(lengths))

  @parameterized.parameters(0, 2)
  def test_resumes_exactly(self, num_threads):
    def start():
      return iter(self.load(num_epochs=None, seed=5, num_threads=num_threads))

    undisturbed = start()
    for _ in range(17):
      next(undisturbed)
    state = json.loads(json.dumps(undisturbed.get_state()))
    expected = rows_of(next(undisturbed) for _ in range(20))
    resumed = start()
    next(resumed)
    resumed.set_state(state)
    self.assertEqual(rows_of(next(resumed) for _ in range(20)), expected)

  def test_processes_share_batches_of_one_shape(self):
    whole = list(self.load(batch_size=12, num_epochs=1))
    parts = [
      list(
        self.load(batch_size=12, num_epochs=1, process_index=i, process_count=3)
      )
      for i in range(3)
    ]
    for step, batch in enumerate(whole):
      mine = [part[step] for part in parts]
      for part in mine:
        self.assertEqual(
          part.ids["long"].shape, (4, batch.ids["long"].shape[1])
        )
      self.assertCountEqual(sum(rows_of(mine), []), rows_of([batch])[0])

  @parameterized.parameters((), (2,), LIMITS, (2, 4, 16, 40))
  def test_masked_share_is_that_of_the_batches(self, *limits):
    batches = list(self.load(batch_size=1, num_epochs=1, length_buckets=limits))
    masks = [b.id_mask[n].ravel() for b in batches for n in ("long", "short")]
    masks = np.concatenate(masks)
    self.assertAlmostEqual(
      length_buckets.masked_share(self.columns, "train", limits),
      1 - masks.mean(),
    )

  @parameterized.parameters(((4, 2),), ((0, 4),), ((3, 3),))
  def test_limits_must_ascend(self, limits):
    with self.assertRaisesRegex(UserError, "length_buckets must ascend"):
      self.load(length_buckets=limits)


class RunTest(run_case.RunTestCase):
  def test_evaluation_keeps_the_order_of_the_rows(self):
    folder = self.directory / "toy"
    toy.write_dataset(folder)
    columns = Columns(folder)
    config = {"tasks": ["click"], "embed_dim": 4, "mlp_dims": [4]}
    method = method_lib.load("dlrm_mlp", config, columns.schema)
    placement = parallel.place(parallel.Config())
    step_config = train_state.StepConfig(
      method, method_lib.Stage(), optimizer_lib.Config(), num_steps=1
    )
    state = placement.init(
      functools.partial(train_state.init_state, config=step_config),
      jax.random.key(0),
    )
    plain, grouped = (
      evaluate.evaluate(
        placement.compile_eval(
          functools.partial(evaluate.forward, method=method)
        ),
        state,
        method,
        columns,
        "test",
        batch_size=32,
        put_batch=placement.put_batch,
        length_buckets=limits,
      )
      for limits in ((), (1, 3))
    )
    click = plain.examples["click"]
    self.assertGreater(np.ptp(click["score"]), 1e-4)
    np.testing.assert_allclose(
      grouped.examples["click"]["score"], click["score"], atol=1e-6
    )
    np.testing.assert_array_equal(
      grouped.examples["click"]["label"], click["label"]
    )
    np.testing.assert_array_equal(
      grouped.examples["group"], plain.examples["group"]
    )
    for name, value in plain.metrics.items():
      np.testing.assert_allclose(
        grouped.metrics[name], value, atol=1e-5, err_msg=name
      )

  def test_a_run_trains_in_buckets_and_tells_the_padding(self):
    case = command_case.CommandTestCase()
    case.directory = self.directory
    case.write_table()
    config = run_case.make_config(train__length_buckets=[1, 3])
    config["data"] |= {
      "path": str(self.directory / "log.parquet"),
      "schema": str(self.directory / "schema.json"),
    }
    with self.assertLogs(level="INFO") as logs:
      result = train.train_and_evaluate(config, str(self.directory / "run"))
    self.assertEqual(result["steps"], 12)
    text = "\n".join(logs.output)
    self.assertRegex(text, r"of sequence positions are padding; .*% in buckets")
    columns = pipeline.open_dataset(config["data"])
    cut = length_buckets.masked_share(columns, "train", (1, 3))
    self.assertLess(cut, length_buckets.masked_share(columns, "train") - 0.1)


if __name__ == "__main__":
  absltest.main()
