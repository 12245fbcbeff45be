"""Ranks equal those of scoring every pair on its own."""

import jax
import numpy as np
from absl.testing import parameterized

from recjax import method as method_lib
from recjax import optimizer, ranking, train_state
from recjax.data.pipeline import open_dataset
from recjax.errors import UserError
from tests import run_case

FEATURES = ("item", "genres", "price")


class RankingTest(run_case.RunTestCase):
  def setUp(self):
    super().setUp()
    self.columns = open_dataset(run_case.data_config())
    self.method = method_lib.Method(
      name="toy",
      module=run_case.make_method(),
      config=run_case.Config(tasks=("click",)),
      schema=self.columns.schema,
    )
    config = train_state.StepConfig(
      self.method,
      method_lib.Stage(),
      optimizer.Config(),
      num_steps=1,
    )
    self.state = train_state.init_state(jax.random.key(0), config)

  def rank(self, **options):
    return ranking.rank_items(
      self.method,
      self.state,
      self.columns,
      "test",
      options.pop("candidate_features", FEATURES),
      **{"num_samples": 1} | options,
    )

  def naive_scores(self, query, items):
    """Item -> score, by one example a pair."""
    batch = self.columns.read("test", np.arange(run_case.ROWS["test"]))
    first = [np.flatnonzero(batch.ids["item"] == i)[0] for i in items]
    mixed = jax.tree.map(lambda x: x[first], batch)
    users = np.full(len(items), batch.ids["user"][query])
    mixed = mixed.replace(ids=mixed.ids | {"user": users})
    mixed = jax.tree.map(jax.numpy.asarray, mixed)
    rows = self.method.read(self.state.tables, mixed)
    predictions, *_ = self.method.apply(
      self.state.params, self.state.tables, rows, mixed, train=False
    )
    return np.asarray(predictions["click"])

  def test_ranks_equal_those_of_every_pair_alone(self):
    found = self.rank()
    parts = {
      split: self.columns.read(split, np.arange(num))
      for split, num in run_case.ROWS.items()
    }
    test = parts["test"]
    queries = np.flatnonzero(test.labels["click"] == 1)
    np.testing.assert_array_equal(found.row, queries)
    items = np.unique(test.ids["item"])
    for place, query in enumerate(queries):
      user = test.ids["user"][query]
      had = np.unique(
        np.concatenate(
          [b.ids["item"][b.ids["user"] == user] for b in parts.values()]
        )
      )
      own = test.ids["item"][query]
      self.assertIn(own, had)
      scores = self.naive_scores(query, items)
      others = scores[~np.isin(items, had)]
      rank = np.sum(others >= scores[items == own])
      self.assertEqual(found.full[place], rank)
      self.assertLessEqual(found.sampled[place], min(rank, 1))
    self.assertAlmostEqual(
      found.metrics["full/hr@5"], np.mean(found.full < 5), places=9
    )
    self.assertAlmostEqual(
      found.metrics["full/ndcg@10"],
      np.mean(np.where(found.full < 10, 1 / np.log2(found.full + 2.0), 0)),
      places=9,
    )

  def test_draws_are_the_same_for_every_model(self):
    first, again = self.rank(max_queries=7), self.rank(max_queries=7)
    self.assertLen(first.row, 7)
    np.testing.assert_array_equal(first.row, again.row)
    np.testing.assert_array_equal(first.sampled, again.sampled)
    self.assertEqual(first.metrics, again.metrics)
    other = self.rank(max_queries=7, seed=1)
    self.assertFalse(np.array_equal(first.row, other.row))

  @parameterized.parameters(
    ({"candidate_features": ("genres",)}, "the item itself, 'item', is"),
    ({"num_samples": 15}, "smaller number of samples"),
    ({"candidate_features": ("item", "x")}, "unknown feature 'x'"),
  )
  def test_mistakes(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      self.rank(**options)
