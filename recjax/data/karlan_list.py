"""Karlan and List: does a matching grant raise more, and at what cost.

Letters that ask 50,083 earlier donors for a gift; a random two thirds were
told that each dollar is matched by one, two or three more. The response is
the dollars that a letter brings (or whether it brings any). The cost is what
the grant pays for it, ratio times gift: nobody knows it before the gift, so
that it must be predicted too. Every letter cost the same, so postage is not in
it. The stated maximum of the grant was one for the whole campaign and was not
reached, so it caps no gift.

Without `path` the adapter reads the copy that ships with the package. The two
rows whose amount is missing are left out. Features are what was known before
the letter; dollars and counts are taken as `log(1 + x)`, missing numbers as the
mean of the others beside a flag (our choices). The shares of a state who gave
(`statecnt`, `stateresponse*`) are left out: they were made from the outcomes.

Source: Karlan and List, American Economic Review 97 (2007), 1774-1793.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa

from recjax.data import trial_source
from recjax.errors import UserError, suggest

VERSION = 1

TREATMENTS = ("none", "1:1", "2:1", "3:1")
RESPONSES = ("amount", "gave")
_MISSING = -999
_AMOUNTS = ("hpa", "freq", "median_hhincome")  # Taken as logarithms.
_NUMBERS = (
  *_AMOUNTS,
  "years",
  "mrm2",
  "perbush",
  "pwhite",
  "pblack",
  "page18_39",
  "ave_hh_sz",
  "powner",
  "psch_atlstba",
  "pop_propurban",
)
_CODES = (
  "ltmedmra",
  "year5",
  "dormant",
  "female",
  "couple",
  "state50one",
  "nonlit",
  "cases",
  "close25",
  "red0",
  "redcty",
)
_DRAWN = ("treatment", "treat_ratio2", "treat_ratio3")
_SEEN = ("out_amountgive", "out_gavedum")


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    path: A Parquet or CSV file of the published columns; empty for the
      bundled copy.
    response: `amount` (dollars) or `gave`.
    split_seed: Of the random split.
    fold: Which fifth of the rows is the test part, from 0 to 4.
  """

  path: str = ""
  response: str = "amount"
  split_seed: int = 0
  fold: int = 0

  def __post_init__(self):
    if self.response not in RESPONSES:
      raise UserError(
        f"data.response: unknown response {self.response!r}"
        + suggest(self.response, RESPONSES)
      )


def sources(config: Config) -> list[pathlib.Path]:
  """The file that it reads."""
  if config.path:
    return [pathlib.Path(config.path).expanduser()]
  return [trial_source.BUNDLED / "karlan_list" / "karlan_list_2007.parquet"]


def prepare(config: Config, directory: pathlib.Path) -> None:
  """Writes the data set; a mistake in the file is a `UserError`."""
  used = (*_NUMBERS, *_CODES, *_DRAWN, *_SEEN)
  rows = trial_source.read_file(sources(config)[0], used)
  rows = {name: rows[name].to_numpy() for name in used}
  kept = np.isfinite(rows["out_amountgive"].astype(np.float64))
  rows = {name: column[kept] for name, column in rows.items()}
  ratio = rows["treatment"] * (
    1 + rows["treat_ratio2"] + 2 * rows["treat_ratio3"]
  )
  amount = rows["out_amountgive"].astype(np.float64)
  columns = {"arm": np.asarray(TREATMENTS)[ratio], "match": ratio * amount}
  columns |= {"amount": amount, "gave": rows["out_gavedum"]}
  columns |= {name: rows[name] for name in _CODES}
  for name in _NUMBERS:
    columns |= _number(name, rows[name].astype(np.float64))
  rows = pa.table(columns)
  trial_source.prepare([rows], _schema(config, columns), directory)


def _number(name: str, values) -> dict[str, np.ndarray]:
  missing = values == _MISSING
  if name in _AMOUNTS:
    values = np.log1p(np.where(missing, 0, values))
  if not missing.any():
    return {name: values}
  values = np.where(missing, values[~missing].mean(), values)
  return {name: values, f"{name}_missing": missing.astype(np.float64)}


def _schema(config: Config, columns) -> dict[str, object]:
  dense = [n for n in columns if n.removesuffix("_missing") in _NUMBERS]
  kinds = dict.fromkeys(dense, "dense") | dict.fromkeys(_CODES, "sparse")
  return {
    "features": {name: {"kind": kind} for name, kind in kinds.items()},
    "trial": {
      "treatment": "arm",
      "control": TREATMENTS[0],
      "treatments": list(TREATMENTS),
      "response": config.response,
      "cost": "match",
    },
    "split": trial_source.random_split(config.split_seed, config.fold),
  }
