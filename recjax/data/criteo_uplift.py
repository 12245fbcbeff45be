"""Criteo-Uplift v2.1: an advertising trial of 13,979,592 people.

Reads the CSV file (`.gz` too) with the header `f0, ..., f11, treatment,
conversion, visit, exposure`. A random 85 % could be shown ads. `exposure` (was
an ad shown) comes after the draw and is no input. There is neither money earned
nor spent: the response is `conversion` and the cost `visit`, a common choice
(arXiv 2407.13664), or the response is `visit` or `conversion` at a cost of one
for everybody treated. A visit happens without treatment too: subtract the cost
of treatment 0 before allocating.

This adapter was written from the columns that the authors document, without the
real file at hand; the tests run it on a file of that form. Its licence is not
for commercial use, so the data does not ship here.

Source: Diemert et al., A Large Scale Benchmark for Uplift Modeling, AdKDD 2018.
"""

import dataclasses
import pathlib

from recjax.data import trial_source
from recjax.errors import UserError, suggest

VERSION = 1

_FEATURES = tuple(f"f{i}" for i in range(12))
_RESPONSES = ("conversion", "visit")
_COSTS = ("visit", "treatment")


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    path: The CSV file.
    response: `conversion` or `visit`.
    cost: `visit`, or `treatment`: one for everybody treated.
    split_seed: Of the random split.
  """

  path: str
  response: str = "conversion"
  cost: str = "visit"
  split_seed: int = 0

  def __post_init__(self):
    for name, known in (("response", _RESPONSES), ("cost", _COSTS)):
      value = getattr(self, name)
      if value not in known:
        raise UserError(
          f"data.{name}: unknown {name} {value!r}" + suggest(value, known)
        )
    if self.response == self.cost:
      raise UserError(
        "data.response and data.cost are both 'visit'; set data.cost=treatment"
      )


def sources(config: Config) -> list[pathlib.Path]:
  """The file that it reads."""
  return [pathlib.Path(config.path).expanduser()]


def estimate_bytes(config: Config) -> int:
  """Disk that `prepare` needs: 160 bytes a row, of 20 in the `.gz` file."""
  (path,) = sources(config)
  return path.stat().st_size * (8 if path.suffix == ".gz" else 2)


def prepare(config: Config, directory: pathlib.Path) -> None:
  """Writes the data set, streamed; a mistake in the file is a `UserError`."""
  columns = (*_FEATURES, "treatment", *_RESPONSES, "exposure")
  trial_source.prepare(
    trial_source.stream_csv(sources(config)[0], columns),
    _schema(config),
    directory,
  )


def _schema(config: Config) -> dict[str, object]:
  trial = {"treatment": "treatment", "control": "0"}
  if config.cost == "visit":
    trial["cost"] = "visit"
  else:
    trial["arm_cost"] = {"0": 0.0, "1": 1.0}
  return {
    "features": {name: {"kind": "dense"} for name in _FEATURES},
    "trial": trial | {"response": config.response},
    "split": trial_source.random_split(config.split_seed),
  }
