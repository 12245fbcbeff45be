"""X5 RetailHero: a trial of a message to members of a loyalty programme.

Reads `uplift_train.csv` (`client_id, treatment_flg, target`) and `clients.csv`
(`client_id, first_issue_date, first_redeem_date, age, gender`) from a folder,
`.gz` too. The response is `target`, whether the client bought; a message costs
`contact_cost`, an assumption of ours. Ages outside of 14 to 100 are taken as
missing (the middle of the others beside a flag), dates as days since 2017-01-01
(our choices). The 45.8 million rows of `purchases.csv` are not read: features
of them can be joined outside and given as a table of one's own.

This adapter was written from the columns that scikit-uplift documents, without
the real files at hand; the tests run it on files of that form.

Source: X5 RetailHero Uplift Modeling contest, 2019.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.data import trial_source
from recjax.errors import UserError

VERSION = 1

_DATES = ("first_issue_date", "first_redeem_date")


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    root: Folder of the two files.
    contact_cost: Of one message, in any unit.
    split_seed: Of the random split.
  """

  root: str
  contact_cost: float = 1.0
  split_seed: int = 0

  def __post_init__(self):
    if not 0 < self.contact_cost < float("inf"):
      raise UserError(
        f"data.contact_cost must be above 0 and finite, got {self.contact_cost}"
      )


def sources(config: Config) -> list[pathlib.Path]:
  """The two files that it reads."""
  root = pathlib.Path(config.root).expanduser()
  found = []
  for name in ("uplift_train.csv", "clients.csv"):
    paths = [p for p in (root / name, root / f"{name}.gz") if p.is_file()]
    if not paths:
      raise UserError(f"{root}: has no {name} or {name}.gz; give its folder")
    found.append(paths[0])
  return found


def prepare(config: Config, directory: pathlib.Path) -> None:
  """Writes the data set; a mistake in the files is a `UserError`."""
  train_path, clients_path = sources(config)
  train = trial_source.read_file(
    train_path, ("client_id", "treatment_flg", "target")
  )
  clients = trial_source.read_file(
    clients_path, ("client_id", "age", "gender", *_DATES)
  )
  place = pc.index_in(train["client_id"], clients["client_id"].unique())
  if place.null_count or len(clients) > len(clients["client_id"].unique()):
    raise UserError(
      f"{clients_path}: {place.null_count} clients of {train_path.name} are "
      "missing, or one is there twice; take the files of one release"
    )
  clients = clients.take(place)
  age = clients["age"].to_numpy().astype(np.float64)
  plausible = (age >= 14) & (age <= 100)
  middle = np.median(age[plausible]) if plausible.any() else 0.0
  columns = {
    "treatment": train["treatment_flg"],
    "target": train["target"],
    "gender": clients["gender"].cast(pa.string()),
    "age": np.where(plausible, age, middle),
    "age_missing": (~plausible).astype(np.float64),
  }
  for name in _DATES:
    days = _days(clients[name])
    columns[f"{name}_missing"] = np.isnan(days).astype(np.float64)
    columns[name] = np.nan_to_num(days)
  trial_source.prepare([pa.table(columns)], _schema(config, columns), directory)


def _days(dates: pa.ChunkedArray) -> np.ndarray:
  seconds = dates.cast(pa.timestamp("s")).cast(pa.int64()).cast(pa.float64())
  start = np.datetime64("2017-01-01", "s").astype(np.int64)
  return (seconds.to_numpy() - start) / 86_400


def _schema(config: Config, columns) -> dict[str, object]:
  names = [n for n in columns if n not in ("treatment", "target", "gender")]
  return {
    "features": {name: {"kind": "dense"} for name in names}
    | {"gender": {"kind": "sparse"}},
    "trial": {
      "treatment": "treatment",
      "control": "0",
      "response": "target",
      "arm_cost": {"0": 0.0, "1": config.contact_cost},
    },
    "split": trial_source.random_split(config.split_seed),
  }
