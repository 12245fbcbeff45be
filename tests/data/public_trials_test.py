"""Adapters of public trials: the bundled ones whole, the others on fixtures."""

import gzip
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
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
    for arm, mean in enumerate((0.813, 0.937, 1.026, 0.933)):
      chosen = rows["treatment"] == arm
      found = rows["response"][chosen].mean()
      np.testing.assert_allclose(found, mean, rtol=1e-3)
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


def write_csv(path, columns):
  pa.csv.write_csv(pa.table(columns), path)


def compress(path):
  with gzip.open(f"{path}.gz", "wb") as file:
    file.write(path.read_bytes())
  path.unlink()
  return f"{path}.gz"


class CriteoUpliftTest(PublicTrialCase):
  def write(self, size=400):
    rng = np.random.default_rng(0)
    columns = {f"f{i}": rng.normal(size=size) for i in range(12)}
    columns["treatment"] = (rng.random(size) < 0.85).astype(int)
    for name in ("conversion", "visit", "exposure"):
      columns[name] = (rng.random(size) < 0.3).astype(int)
    path = self.directory / "criteo.csv"
    write_csv(path, columns)
    return path, columns

  def test_visits_are_the_cost(self):
    path, data = self.write()
    columns = self.open("criteo_uplift", path=compress(path))
    rows = self.everything(columns)
    names = [f.name for f in columns.schema.features]
    self.assertEqual(names, [f"f{i}" for i in range(12)])
    self.assertEqual(rows["treatment"].sum(), data["treatment"].sum())
    self.assertEqual(rows["response"].sum(), data["conversion"].sum())
    self.assertEqual(rows["cost"].sum(), data["visit"].sum())

  def test_everybody_treated_may_cost_one(self):
    path, data = self.write()
    columns = self.open(
      "criteo_uplift", path=str(path), response="visit", cost="treatment"
    )
    rows = self.everything(columns)
    np.testing.assert_array_equal(rows["cost"], rows["treatment"])
    with self.assertRaisesRegex(UserError, "set data.cost=treatment"):
      self.open("criteo_uplift", path=str(path), response="visit")

  def test_a_file_of_other_columns_is_told(self):
    path = self.directory / "wrong.csv"
    write_csv(path, {"f0": [1.0], "treatment": [1]})
    with self.assertRaisesRegex(UserError, "wrong.csv: lacks the columns f1"):
      self.open("criteo_uplift", path=str(path))


class LentaTest(PublicTrialCase):
  def test_numbers_strings_and_what_is_missing(self):
    rng = np.random.default_rng(0)
    age = [None if i % 4 == 0 else float(i) for i in range(200)]
    path = self.directory / "lenta.csv"
    write_csv(
      path,
      {
        "group": rng.choice(["test", "control"], 200),
        "response_att": rng.integers(0, 2, 200),
        "age": age,
        "cheque_count_3m_g20": rng.normal(size=200),
        "gender": [("M", "F", None)[i % 3] for i in range(200)],
      },
    )
    columns = self.open("lenta", path=compress(path), contact_cost=2.0)
    trial, rows = columns.schema.trial, self.everything(columns)
    self.assertEqual(trial.treatments, ("control", "test"))
    np.testing.assert_array_equal(rows["cost"], 2 * rows["treatment"])
    names = [f.name for f in columns.schema.dense_features]
    self.assertEqual(names, ["age", "cheque_count_3m_g20", "age_missing"])
    self.assertEqual([f.name for f in columns.schema.id_features], ["gender"])
    dense = np.concatenate([columns.raw_dense(split) for split in SPLITS])
    missing = dense[:, 2] == 1
    self.assertEqual(missing.sum(), 50)
    mean = np.mean([x for x in age if x is not None])
    np.testing.assert_allclose(dense[missing, 0], mean, rtol=1e-6)


class X5Test(PublicTrialCase):
  def write(self, size=200):
    rng = np.random.default_rng(0)
    clients = np.array([f"{i:010x}" for i in range(size)])
    root = self.directory / "x5"
    root.mkdir()
    write_csv(
      root / "uplift_train.csv",
      {
        "client_id": clients[::-1],
        "treatment_flg": rng.integers(0, 2, size),
        "target": rng.integers(0, 2, size),
      },
    )
    write_csv(
      root / "clients.csv",
      {
        "client_id": clients,
        "first_issue_date": ["2017-01-02 00:00:00"] * size,
        "first_redeem_date": [
          None if i % 2 else "2017-01-03 12:00:00" for i in range(size)
        ],
        "age": [-7491 if i < 10 else 40 for i in range(size)],
        "gender": ["F", "U"] * (size // 2),
      },
    )
    return root

  def test_clients_are_joined_and_odd_ages_flagged(self):
    columns = self.open("x5", root=str(self.write()), contact_cost=3.0)
    self.assertEqual(columns.schema.trial.known_cost, (0, 3))
    names = [f.name for f in columns.schema.dense_features]
    dense = np.concatenate([columns.raw_dense(split) for split in SPLITS])
    dense = dict(zip(names, dense.T, strict=True))
    self.assertEqual(dense["age_missing"].sum(), 10)
    self.assertEqual(set(dense["age"].tolist()), {40})
    self.assertEqual(set(dense["first_issue_date"].tolist()), {1})
    self.assertEqual(set(dense["first_redeem_date"].tolist()), {0, 2.5})
    self.assertEqual(dense["first_redeem_date_missing"].sum(), 100)

  def test_missing_clients_and_files_are_told(self):
    root = self.write()
    table = pa.csv.read_csv(root / "clients.csv")
    pa.csv.write_csv(table[5:], root / "clients.csv")
    with self.assertRaisesRegex(UserError, "5 clients of uplift_train.csv"):
      self.open("x5", root=str(root))
    (root / "clients.csv").unlink()
    with self.assertRaisesRegex(UserError, "has no clients.csv"):
      self.open("x5", root=str(root))


if __name__ == "__main__":
  absltest.main()
