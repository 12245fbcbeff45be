"""What a randomised trial is: who was drawn for what, its response and cost.

In a schema file the block `trial` names the columns, in place of labels or
beside them:

```json
"trial": {"treatment": "arm", "control": "none", "response": "spend",
          "cost": "cost"}
```

`"arm_cost": {"none": 0, "mail": 0.15}` in place of `cost` states what each
treatment costs. Optional are `propensity`, the column of the chance with which
each row got the treatment that it got (by default the treatment's share of the
training part); `cluster`, the column of what was drawn together (by default
each row by itself); and `treatments`, all of them in the order of their dose.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from recjax.errors import UserError, check_keys

_COLUMNS = ("treatment", "response", "cost", "propensity", "cluster")
# What preparing the data finds.
_FOUND = (
  "propensities",
  "is_binary",
  "response_mean",
  "response_std",
  "cost_std",
)


@dataclasses.dataclass(frozen=True)
class Trial:
  """The columns of a trial, and what its training part holds.

  Attributes:
    treatment: Column of the treatment.
    control: Its value for "none", which becomes treatment 0.
    response: Column of the outcome that counts.
    cost: Column of what a row has cost; None if `arm_cost` says.
    arm_cost: Treatment -> cost of each of its rows; 0 for the control.
    propensity: Column of the chance of the treatment that a row got.
    cluster: Column of what was drawn together.
    treatments: Names in the order of their numbers, the control first. Found
      by preparing the data (the order of `arm_cost`, else numbers by value and
      names by letter) unless given.
    propensities: Share of each treatment in the training part; found.
    is_binary: Whether every response is 0 or 1; found.
    response_mean: Of the training part; found.
    response_std: Likewise.
    cost_std: Likewise.
  """

  treatment: str
  control: str
  response: str
  cost: str | None = None
  arm_cost: Mapping[str, float] | None = None
  propensity: str | None = None
  cluster: str | None = None
  treatments: tuple[str, ...] = ()
  propensities: tuple[float, ...] = ()
  is_binary: bool = False
  response_mean: float = 0.0
  response_std: float = 0.0
  cost_std: float = 0.0

  @property
  def num_treatments(self) -> int:
    """Number of treatments, the control among them."""
    return len(self.treatments)

  @property
  def known_cost(self) -> tuple[float, ...] | None:
    """Cost of each treatment by its number, where the schema states it."""
    if self.arm_cost is None:
      return None
    return tuple(self.arm_cost[name] for name in self.treatments)

  @property
  def columns(self) -> tuple[str, ...]:
    """The columns that it reads."""
    names = (getattr(self, name) for name in _COLUMNS)
    return tuple(name for name in names if name is not None)

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON data; `from_dict` reads it back."""
    entry = dataclasses.asdict(self)
    entry["treatments"] = list(self.treatments)
    entry["propensities"] = list(self.propensities)
    if self.arm_cost is not None:
      entry["arm_cost"] = dict(self.arm_cost)
    return entry

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], where: str):
    """Reads and checks the JSON form; `where` names the place in errors."""
    fields = [field.name for field in dataclasses.fields(cls)]
    check_keys(data, fields, where)
    data = {name: value for name, value in data.items() if value is not None}
    for name in ("treatment", "control", "response"):
      if name not in data:
        raise UserError(f'{where}: "{name}" is missing')
    for name in _COLUMNS:
      if name in data and not isinstance(data[name], str):
        raise UserError(
          f"{where}: {name} must be the name of a column, got {data[name]!r}"
        )
    if ("cost" in data) == ("arm_cost" in data):
      raise UserError(
        f'{where}: give either "cost", the column of what each row cost, or '
        '"arm_cost", what each treatment costs'
      )
    trial = cls(
      control=str(data["control"]),
      arm_cost=_read_costs(data.get("arm_cost"), where),
      treatments=tuple(map(str, _read_list(data, "treatments", where))),
      propensities=tuple(_read_list(data, "propensities", where)),
      **{n: data[n] for n in (*_COLUMNS, *_FOUND[1:]) if n in data},
    )
    _check(trial, where)
    return trial


def _read_list(data, name: str, where: str):
  value = data.get(name, ())
  if not isinstance(value, list | tuple):
    raise UserError(f"{where}: {name} must be a list, got {value!r}")
  return value


def _read_costs(costs, where: str) -> dict[str, float] | None:
  if costs is None:
    return None
  if not isinstance(costs, Mapping):
    raise UserError(f"{where}: arm_cost must be an object, got {costs!r}")
  for name, cost in costs.items():
    if (
      not isinstance(cost, int | float)
      or isinstance(cost, bool)
      or not 0 <= cost < float("inf")
    ):
      raise UserError(
        f"{where}: arm_cost of {name!r} must be a finite number of at least "
        f"0, got {cost!r}"
      )
  return {str(name): float(cost) for name, cost in costs.items()}


def _check(trial: Trial, where: str):
  if len(set(trial.columns)) < len(trial.columns):
    raise UserError(
      f"{where}: {', '.join(trial.columns)} must be different columns"
    )
  if trial.arm_cost is not None:
    if trial.control not in trial.arm_cost:
      raise UserError(
        f"{where}: arm_cost lacks the control {trial.control!r}; give it as 0"
      )
    if trial.arm_cost[trial.control]:
      raise UserError(
        f"{where}: arm_cost of the control {trial.control!r} must be 0, got "
        f"{trial.arm_cost[trial.control]:g}; give what a treatment costs more"
      )
  names = trial.treatments
  if names and (names[0] != trial.control or len(set(names)) < len(names)):
    raise UserError(
      f"{where}: treatments must begin with the control {trial.control!r} and "
      f"name each once, got {list(names)}"
    )
  if names and trial.arm_cost is not None and set(names) != set(trial.arm_cost):
    raise UserError(
      f"{where}: treatments {list(names)} and arm_cost "
      f"{list(trial.arm_cost)} must name the same"
    )
