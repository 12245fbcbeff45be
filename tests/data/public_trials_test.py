"""Adapters of public trials: the bundled ones whole, the others on fixtures."""

import pathlib
import tempfile

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
from absl.testing import absltest, parameterized

from recjax.data import hillstrom, karlan_list, pipeline
from recjax.errors import UserError
from recjax.schema import SPLITS


class PublicTrialCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def open(self, name, **options):
    return pipeline.open_dataset(
      {"name": name, "cache_dir": str(self.directory / "cache"), **options}
    )

  def everything(self, columns):
    """The trial rows of all parts together."""
    parts = [
      columns.read(split, np.arange(columns.num_rows[split])).trial
      for split in SPLITS
    ]
    return {
      field: np.concatenate([getattr(part, field) for part in parts])
      for field in ("treatment", "response", "cost", "propensity")
    }


class HillstromTest(PublicTrialCase):
  @parameterized.parameters(
    ("spend", (0.653, 1.423, 1.077)),
    ("visit", (0.106, 0.183, 0.151)),
    ("conversion", (0.0057, 0.0125, 0.0088)),
  )
  def test_published_counts_and_means(self, response, means):
    columns = self.open("hillstrom", response=response)
    trial, rows = columns.schema.trial, self.everything(columns)
    self.assertEqual(trial.treatments, hillstrom.TREATMENTS)
    self.assertEqual(
      np.bincount(rows["treatment"]).tolist(), [21_306, 21_307, 21_387]
    )
    for arm, mean in enumerate(means):
      found = rows["response"][rows["treatment"] == arm].mean()
      np.testing.assert_allclose(found, mean, rtol=0.01)
    np.testing.assert_allclose(trial.propensities, 1 / 3, atol=0.01)
    self.assertEqual(trial.known_cost, (0, 0.1, 0.1))
    self.assertEqual(trial.is_binary, response != "spend")

  def test_parts_and_features(self):
    columns = self.open("hillstrom")
    shares = [columns.num_rows[split] / 64_000 for split in SPLITS]
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.01)
    names = [f.name for f in columns.schema.features]
    self.assertEmpty(set(names) & {"segment", "visit", "conversion", "spend"})
    history = columns.raw_dense("train")[:, names.index("history")]
    self.assertLess(history.max(), 9)

  def test_csv_of_the_original_columns_and_mistakes(self):
    path = self.directory / "hillstrom.csv"
    table = pq.read_table(hillstrom.sources(hillstrom.Config())[0])[:400]
    pyarrow.csv.write_csv(table, path)
    columns = self.open("hillstrom", path=str(path), mail_cost=0.5)
    self.assertEqual(sum(columns.num_rows.values()), 400)
    self.assertEqual(columns.schema.trial.known_cost, (0, 0.5, 0.5))
    pyarrow.csv.write_csv(table.drop_columns(["spend"]), path)
    with self.assertRaisesRegex(UserError, "lacks the columns spend"):
      self.open("hillstrom", path=str(path))
    with self.assertRaisesRegex(UserError, "unknown response 'buy'"):
      self.open("hillstrom", response="buy")
    with self.assertRaisesRegex(UserError, "mail_cost"):
      self.open("hillstrom", mail_cost=-1.0)


class KarlanListTest(PublicTrialCase):
  def test_published_means_and_cost_of_the_match(self):
    columns = self.open("karlan_list")
    trial, rows = columns.schema.trial, self.everything(columns)
    self.assertEqual(trial.treatments, karlan_list.TREATMENTS)
    self.assertLen(rows["treatment"], 50_081)
    for arm, mean in enumerate((0.813, 0.937, 1.026, 0.938)):
      chosen = rows["treatment"] == arm
      found = rows["response"][chosen].mean()
      np.testing.assert_allclose(found, mean, rtol=0.01)
      np.testing.assert_allclose(
        rows["cost"][chosen], arm * rows["response"][chosen]
      )
    self.assertIsNone(trial.known_cost)

  def test_gave_and_features(self):
    columns = self.open("karlan_list", response="gave")
    rows = self.everything(columns)
    self.assertTrue(columns.schema.trial.is_binary)
    for arm, share in enumerate((0.0179, 0.0207, 0.0226, 0.0227)):
      found = rows["response"][rows["treatment"] == arm].mean()
      np.testing.assert_allclose(found, share, rtol=0.01)
    names = {feature.name for feature in columns.schema.features}
    known = {n for n in names if n.startswith(("treat", "out", "state"))}
    self.assertEqual(known, {"state50one"})
    self.assertGreater(columns.raw_dense("train").min(), -900)

  def test_no_stated_maximum_of_the_grant_was_reached(self):
    table = pq.read_table(karlan_list.sources(karlan_list.Config())[0])
    table = {n: table[n].to_numpy() for n in table.column_names}
    ratio = 1 + table["treat_ratio2"] + 2 * table["treat_ratio3"]
    match = ratio * np.nan_to_num(table["out_amountgive"])
    for size in (25, 50, 100):
      paid = match[table[f"treat_size{size}"] == 1].sum()
      self.assertLess(paid, 1000 * size)


if __name__ == "__main__":
  absltest.main()
