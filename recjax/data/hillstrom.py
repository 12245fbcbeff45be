"""Hillstrom: a trial of two e-mails against none, 64,000 customers, 2008.

Without `path` the adapter reads the copy that ships with the package, with it a
CSV file of the original columns. The response is what a customer spends in the
two weeks after, or whether there was a visit or a purchase.

The trial states no cost: `mail_cost` is an assumption of ours (ten cents a
mail, the same for both) and belongs beside every result. Features are what was
known before; spending is taken as `log(1 + dollars)` (our choice). The split is
random, since the rows carry no time.

Source: Kevin Hillstrom, The MineThatData E-Mail Analytics And Data Mining
Challenge, 2008.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa

from recjax.data import trial_source
from recjax.errors import UserError, suggest

VERSION = 1

TREATMENTS = ("No E-Mail", "Mens E-Mail", "Womens E-Mail")
RESPONSES = ("spend", "visit", "conversion")
_DENSE = ("recency", "history", "mens", "womens", "newbie")
_SPARSE = ("history_segment", "zip_code", "channel")


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    path: A CSV file of the original columns; empty for the bundled copy.
    response: `spend` (dollars), `visit` or `conversion`.
    mail_cost: Dollars a mail.
    split_seed: Of the random split.
    fold: Which fifth of the rows is the test part, from 0 to 4.
  """

  path: str = ""
  response: str = "spend"
  mail_cost: float = 0.10
  split_seed: int = 0
  fold: int = 0

  def __post_init__(self):
    if self.response not in RESPONSES:
      raise UserError(
        f"data.response: unknown response {self.response!r}"
        + suggest(self.response, RESPONSES)
      )
    if not 0 < self.mail_cost < float("inf"):
      raise UserError(
        f"data.mail_cost must be above 0 and finite, got {self.mail_cost}"
      )


def sources(config: Config) -> list[pathlib.Path]:
  """The file that it reads."""
  if config.path:
    return [pathlib.Path(config.path).expanduser()]
  return [trial_source.BUNDLED / "hillstrom" / "hillstrom.parquet"]


def prepare(config: Config, directory: pathlib.Path) -> None:
  """Writes the data set; a mistake in the file is a `UserError`."""
  used = (*_DENSE, *_SPARSE, "segment", config.response)
  rows = trial_source.read_file(sources(config)[0], used).select(used)
  history = np.log1p(rows["history"].to_numpy())
  rows = rows.set_column(
    rows.column_names.index("history"), "history", pa.array(history)
  )
  trial_source.prepare([rows], schema(config), directory)


def schema(config: Config) -> dict[str, object]:
  """What its columns are, as a schema file says it."""
  kinds = dict.fromkeys(_DENSE, "dense") | dict.fromkeys(_SPARSE, "sparse")
  none, *mails = TREATMENTS
  return {
    "features": {name: {"kind": kind} for name, kind in kinds.items()},
    "trial": {
      "treatment": "segment",
      "control": none,
      "response": config.response,
      "arm_cost": {none: 0.0} | dict.fromkeys(mails, config.mail_cost),
    },
    "split": trial_source.random_split(config.split_seed, config.fold),
  }
