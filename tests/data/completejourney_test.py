"""The Complete Journey adapter, on a small log of the source's own form."""

import dataclasses
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import absltest, parameterized

from recjax.data import completejourney, completejourney_source
from recjax.data.columns import Columns
from recjax.data.vocabulary import load_values
from recjax.errors import UserError
from recjax.schema import SPLITS

WEEK = 7 * 86_400_000
START = 1_483_246_406_000  # 2017-01-01.
SIZES = {"household": 9, "store": 3, "product": 24}
CONFIG = completejourney.Config(
  max_len=6, basket_share=0.5, min_purchases=8, warm_up_weeks=2, strength=3.0
)


def small_log(seed=0, num_baskets=700):
  """Columns of `transactions.parquet`; many baskets have equal times."""
  rng = np.random.default_rng(seed)
  baskets = []
  for number in range(num_baskets):
    # Half-hours, so that moments coincide.
    time = START + int(rng.integers(0, 53 * 7 * 48)) * 1_800_000
    size = int(rng.integers(1, 6))
    products = rng.choice(SIZES["product"], size, replace=False)
    baskets += [
      {
        "household_id": 900 + int(number % SIZES["household"]),
        "store_id": 300 + int(rng.integers(0, 3)) * (number % 5 > 0),
        "basket_id": 31_198_570_044 + number,
        "product_id": 1000 + 7 * int(product),
        "quantity": int(rng.choice([0, 1, 1, 1, 2])),
        "sales_value": float(np.round(rng.uniform(0, 9), 2)),
        "retail_disc": float(np.round(rng.uniform(0, 1), 2)),
        "coupon_disc": 0.0,
        "coupon_match_disc": 0.0,
        "week": 1 + (time - START) // WEEK,
        "transaction_timestamp": time,
      }
      for product in products
    ]
  # One store a basket, as its first line says.
  store = {}
  for line in baskets:
    line["store_id"] = store.setdefault(line["basket_id"], line["store_id"])
  return baskets


def write_files(folder, lines):
  """Files with the header and types of the package's."""
  table = pa.Table.from_pylist(lines)
  time = table["transaction_timestamp"].cast(pa.timestamp("ms"))
  position = table.column_names.index("transaction_timestamp")
  table = table.set_column(
    position, "transaction_timestamp", time.cast(pa.timestamp("ns"))
  )
  pq.write_table(table, folder / "transactions.parquet")
  # The last product has no row, one before it no category and type.
  products = [
    {
      "product_id": 1000 + 7 * i,
      "manufacturer_id": i % 5,
      "department": "AB C"[i % 2],
      "brand": ("National", "Private")[i % 3 == 0],
      "product_category": None if i == 21 else f"category {i % 6}",
      "product_type": None if i == 21 else f"type {i % 12}",
      "package_size": None,
    }
    for i in range(SIZES["product"] - 1)
  ]
  pq.write_table(pa.Table.from_pylist(products), folder / "products.parquet")
  names = completejourney_source.DEMOGRAPHICS
  people = [
    {"household_id": 900 + i} | {name: f"{name} {i % 3}" for name in names}
    for i in range(4)
  ]
  people[1]["home_ownership"] = None
  pq.write_table(pa.Table.from_pylist(people), folder / "demographics.parquet")
  return {p["product_id"]: p for p in products}


@dataclasses.dataclass
class Prepared:
  """A data set, read back with raw values in place of vocabulary rows."""

  rows: dict
  batches: dict
  dense: dict
  products: dict


def prepare(lines, config=CONFIG):
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    products = write_files(folder, lines)
    completejourney.prepare(
      dataclasses.replace(config, root=name), folder / "out"
    )
    columns = Columns(folder / "out")
    values = {
      vocab: np.array([None, *load_values(folder / "out", vocab).to_pylist()])
      for vocab in {feature.vocab for feature in columns.schema.id_features}
    }
    rows, batches, dense = {}, {}, {}
    for split in SPLITS:
      batch = columns.read(split, np.arange(columns.num_rows[split]))
      batches[split] = batch
      rows[split] = {
        f.name: values[f.vocab][batch.ids[f.name]]
        for f in columns.schema.id_features
      }
      names = [f.name for f in columns.schema.dense_features]
      raw = columns.raw_dense(split)
      dense[split] = dict(zip(names, raw.T, strict=True))
    return Prepared(rows, batches, dense, products)


def week_part(week):
  return int(np.digitize(week, completejourney.LAST_WEEKS, right=True))


class CompleteJourneyTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.lines = small_log()
    cls.data = prepare(cls.lines)

  def baskets(self, split):
    """(basket's lines, its rows) of a part, in the order of the rows."""
    basket_ids = sorted({line["basket_id"] for line in self.lines})
    batch = self.data.batches[split]
    by_id = {}
    for line in self.lines:
      by_id.setdefault(line["basket_id"], []).append(line)
    for number in np.unique(batch.groups["query"]):
      yield (
        by_id[basket_ids[number]],
        np.flatnonzero(batch.groups["query"] == number),
      )

  def test_rows_are_purchases_and_products_sold_beside_them(self):
    train = [x for x in self.lines if week_part(x["week"]) == 0]
    ids, counts = np.unique(
      [x["product_id"] for x in train], return_counts=True
    )
    catalogue = set(ids[counts >= CONFIG.min_purchases].tolist())
    department = lambda p: self.data.products.get(p, {}).get("department")  # noqa: E731
    num_bought = num_drawn = num_near = 0
    for split in SPLITS:
      rows, label = self.data.rows[split], self.data.batches[split].labels
      for lines, chosen in self.baskets(split):
        self.assertEqual(week_part(lines[0]["week"]), SPLITS.index(split))
        self.assertGreater(lines[0]["week"], CONFIG.warm_up_weeks)
        products = rows["product_id"][chosen].tolist()
        bought = label["purchase"][chosen] == 1
        # Every line that may be a row is one.
        self.assertCountEqual(
          [p for p, b in zip(products, bought, strict=True) if b],
          [
            x["product_id"]
            for x in lines
            if x["product_id"] in catalogue and x["quantity"] > 0
          ],
        )
        drawn = [p for p, b in zip(products, bought, strict=True) if not b]
        self.assertEqual(len(set(drawn)), len(drawn))
        self.assertNoCommonElements(drawn, [x["product_id"] for x in lines])
        near = {
          x["product_id"]
          for x in self.lines
          if x["store_id"] == lines[0]["store_id"]
          and x["week"] == lines[0]["week"]
        }
        kinds = {department(x["product_id"]) for x in lines}
        for product in drawn:
          self.assertIn(product, catalogue)
          self.assertIn(department(product), kinds)
          num_near += product in near
        num_bought, num_drawn = (
          num_bought + bought.sum(),
          num_drawn + len(drawn),
        )
        for name, raw in (("household_id", "household_id"), ("store_id",) * 2):
          self.assertEqual(set(rows[name][chosen].tolist()), {lines[0][raw]})
    self.assertGreater(num_bought, 400)
    self.assertGreater(num_drawn, 0.6 * num_bought)
    self.assertLess(num_drawn, num_bought)
    self.assertGreater(num_near, 0.4 * num_drawn)

  def assertNoCommonElements(self, one, other):
    self.assertFalse(set(one) & set(other))

  def visible(self, lines, kind="household", by_week=False):
    """What rows of a basket may know of the lines before it."""
    own = lines[0]
    allowed = (0, 1) if week_part(own["week"]) == 2 else (0,)
    when = "week" if by_week else "transaction_timestamp"
    return [
      x
      for x in self.lines
      if x[when] < own[when]
      and week_part(x["week"]) in allowed
      and (by_week or x[f"{kind}_id"] == own[f"{kind}_id"])
    ]

  def test_histories_equal_a_loop(self):
    longest = 0
    for split in SPLITS:
      batch, rows = self.data.batches[split], self.data.rows[split]
      for lines, chosen in self.baskets(split):
        seen = self.visible(lines)
        seen.sort(
          key=lambda x: (
            week_part(x["week"]),
            x["transaction_timestamp"],
            x["basket_id"],
            x["product_id"],
          )
        )
        seen = seen[-CONFIG.max_len :]
        for row in chosen:
          mask = batch.id_mask["purchases"][row]
          self.assertEqual(
            rows["purchases"][row][mask].tolist(),
            [x["product_id"] for x in seen],
          )
          age = batch.event_age["purchases"][row][mask]
          now = lines[0]["transaction_timestamp"]
          self.assertEqual(
            age.tolist(),
            [(now - x["transaction_timestamp"]) / 1000 for x in seen],
          )
          self.assertTrue((age > 0).all())
          for side, name in (
            ("purchase_department", "department"),
            ("purchase_category", "product_category"),
            ("purchase_type", "product_type"),
          ):
            self.assertEqual(
              rows[side][row][mask].tolist(),
              [
                self.data.products.get(x["product_id"], {}).get(name)
                for x in seen
              ],
            )
        longest = max(longest, len(seen))
    self.assertEqual(longest, CONFIG.max_len)

  def test_counts_and_rates_equal_a_loop(self):
    product_of = self.data.products

    def same(lines, product, name):
      if name == "product":
        return [x for x in lines if x["product_id"] == product]
      value = product_of.get(product, {}).get(name)
      return [
        x
        for x in lines
        if value is not None
        and product_of.get(x["product_id"], {}).get(name) == value
      ]

    def rate(count, of, prior):
      return (count + 3 * prior) / (max(of, count) + 3)

    odds = lambda p: np.log(p / (1 - p))  # noqa: E731
    checked = 0
    for split in SPLITS:
      rows, dense = self.data.rows[split], self.data.dense[split]
      for lines, chosen in list(self.baskets(split))[::3]:
        mine, all_before = (
          self.visible(lines),
          self.visible(lines, by_week=True),
        )
        for row in chosen:
          product = rows["product_id"][row]
          n = lambda where, name, p=product: len(same(where, p, name))  # noqa: E731
          general = rate(
            n(all_before, "product"), n(all_before, "product_category"), 0.01
          )
          expected = {
            "bought_product": np.log1p(min(n(mine, "product"), 50)),
            "bought_manufacturer_id": np.log1p(
              min(n(mine, "manufacturer_id"), 50)
            ),
            "product_share": odds(general),
            "household_product_share": odds(
              rate(n(mine, "product"), n(mine, "product_category"), general)
            ),
          }
          last = [
            x["transaction_timestamp"] for x in same(mine, product, "product")
          ]
          days = 180.0
          if last:
            age = lines[0]["transaction_timestamp"] - max(last)
            days = min(days, age / 86_400_000)
          expected["days_since_product"] = np.log1p(days)
          sold = same(all_before, product, "product")
          cents = sum(round(100 * x["sales_value"]) for x in sold)
          expected["price"] = np.log((cents + 300) / (len(sold) + 1))
          for name, value in expected.items():
            self.assertAlmostEqual(float(dense[name][row]), value, 4, name)
          checked += 1
    self.assertGreater(checked, 200)

  def test_what_comes_later_changes_nothing(self):
    """Training rows of the first weeks, when all later lines are others."""
    changed = [dict(line) for line in self.lines]
    late = [line for line in changed if line["week"] > 20]
    for line, other in zip(late, late[::-1], strict=True):
      line["sales_value"] = 7.5
      line["household_id"] = other["household_id"]
    after = prepare(changed)
    before = self.data
    limit = self._rows_until(20)
    self.assertGreater(limit, 100)
    for name in before.dense["train"]:
      np.testing.assert_array_equal(
        after.dense["train"][name][:limit],
        before.dense["train"][name][:limit],
        name,
      )
    for name, ids in before.rows["train"].items():
      self.assertEqual(
        after.rows["train"][name][:limit].tolist(), ids[:limit].tolist(), name
      )

  def _rows_until(self, week):
    rows = [
      row
      for lines, chosen in self.baskets("train")
      for row in chosen
      if lines[0]["week"] <= week
    ]
    self.assertEqual(sorted(rows), list(range(len(rows))))
    return len(rows)

  def test_the_order_of_the_file_does_not_matter(self):
    again = prepare(self.lines[::-1])
    for split in SPLITS:
      for name, ids in self.data.rows[split].items():
        self.assertEqual(again.rows[split][name].tolist(), ids.tolist(), name)

  def test_draws_follow_what_is_sold(self):
    """A product is drawn as often as others sell it beside."""
    lines = {
      "product": np.array([0] * 60 + [1] * 30 + [2] * 10),
      "basket": np.arange(100),
      "store": np.zeros(100, int),
      "week": np.ones(100, int),
      "quantity": np.ones(100, int),
    }
    log = completejourney_source.Log(
      lines,
      {
        "store": np.array([3]),
        "basket": np.arange(100, 200),
        "product": np.arange(3),
      },
      {"department": pa.array(["A"] * 3)},
      {},
    )
    counts = np.zeros((3, 3))
    for seed in range(40):
      found = completejourney_source.draw_examples(
        log,
        catalogue=np.ones(3, bool),
        asked=np.ones(100, bool),
        negatives=1,
        seed=seed,
      )
      own = lines["product"][found.line[~found.bought]]
      np.add.at(counts, (own, found.product[~found.bought]), 1)
    self.assertEqual(np.diag(counts).tolist(), [0, 0, 0])
    np.testing.assert_allclose(counts[0, 1] / counts[0].sum(), 0.75, atol=0.03)
    np.testing.assert_allclose(counts[1, 0] / counts[1].sum(), 6 / 7, atol=0.03)

  @parameterized.parameters(
    ({"basket_share": 0.0}, r"basket_share must be in \(0, 1\]"),
    ({"negatives": 0}, "negatives must be at least 1"),
    ({"strength": 0.0}, "strength must be above 0"),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      completejourney.Config(**options)

  def test_mistakes_are_told_in_one_line(self):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    config = dataclasses.replace(CONFIG, root=str(folder))
    with mock.patch.object(
      completejourney_source, "PACKAGE", "no_such_package_at_all"
    ):
      with self.assertRaisesRegex(
        UserError, "no_such_package_at_all is not in"
      ):
        completejourney.sources(completejourney.Config())
    with self.assertRaisesRegex(
      UserError, "transactions.parquet: no such file"
    ):
      completejourney.sources(config)

    def broken(message, lines):
      write_files(folder, lines)
      with self.assertRaisesRegex(UserError, message):
        completejourney.prepare(config, folder / "out")

    lines = [dict(line) for line in self.lines]
    broken(
      "leaves no test rows", [x for x in lines if week_part(x["week"]) < 2]
    )
    lines[7]["quantity"] = None
    broken("'quantity', row 8: the value is missing", lines)
    for line in lines:
      del line["quantity"]
    broken("column 'quantity' is missing", lines)
    lines = [dict(line) for line in self.lines]
    lines[0]["week"] = 60
    broken("'week': basket .* weeks must follow each other", lines)
    (folder / "products.parquet").write_bytes(b"no parquet")
    with self.assertRaisesRegex(UserError, "products.parquet: cannot be read"):
      completejourney_source._read(
        folder / "products.parquet", {"a": pa.int64()}
      )


if __name__ == "__main__":
  absltest.main()
