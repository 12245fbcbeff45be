"""Planted trials: response and cost of every treatment are known.

A randomised trial of four levels of one incentive, drawn from a known law, so
that the best plan of every budget, and what a policy falls short of it
(regret), are known too.

* `well_specified`: the expected response is linear in the features, and the
  expected cost nearly so. A linear model can be right, and one that is fitted
  to its errors decides well: there is nothing to gain from more.
* `misspecified`: for a ninth of the people, marked by one feature, the effect
  is large and rises with another; for the rest it falls with that one. No
  linear model is right. Least squares serves the few, whose errors are large,
  and gets the direction of the many wrong, whom the budget decides about;
  prediction and decision part.

Both claims are about linear networks (`--config.model.mlp_dims=()`,
`head_dims=()`). The laws were chosen by least squares and the best linear
policy on true tables, and fixed before any method was trained on them.

```sh
python -m experiments.run \\
    --config=experiments/configs/budget_allocation.py:base --workdir=DIR \\
    --config.data.name=synthetic_trial --config.data.world=misspecified
```

Beside the rows lie `truth_train.npz`, `truth_valid.npz` and `truth_test.npz`:
`response` and `cost`, `[people, treatments]`, in the order of the rows. The
evaluation reads them for `regret`; no model does.
"""

import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Float

from recjax.batch import TrialRows
from recjax.data.columns import Block, ColumnWriter
from recjax.errors import UserError
from recjax.schema import SPLITS, Feature, Schema, Split, suggest
from recjax.trial import Trial

VERSION = 1

WORLDS = ("well_specified", "misspecified")
TREATMENTS = ("none", "small", "medium", "large")
_LEVELS = np.arange(len(TREATMENTS))
_SHARE = 0.2  # Of the validation and of the test part.


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the planted trial.

  Attributes:
    world: `well_specified` or `misspecified`.
    seed: Of the data; the seed of a run is another.
    num_rows: People of all parts together, at least 100.
    num_features: Features, at least 5; those after the fifth have no effect.
    noise: Standard deviation of a response about its expectation.
  """

  world: str
  seed: int = 0
  num_rows: int = 100_000
  num_features: int = 10
  noise: float = 0.5

  def __post_init__(self):
    if self.world not in WORLDS:
      raise UserError(
        f"data.world: unknown world {self.world!r}"
        + suggest(self.world, WORLDS)
      )
    for name, low in (("seed", 0), ("num_rows", 100), ("num_features", 5)):
      if getattr(self, name) < low:
        raise UserError(
          f"data.{name} must be at least {low}, got {getattr(self, name)}"
        )
    if not 0 < self.noise < np.inf:
      raise UserError(
        f"data.noise must be above 0 and finite, got {self.noise}"
      )


def sources(config: Config) -> list:
  """No files: the options are all that the data depends on."""
  del config
  return []


def estimate_bytes(config: Config) -> int:
  """About how much disk the prepared data needs."""
  return (64 + 4 * config.num_features) * config.num_rows


def prepare(config: Config, directory: epath.PathLike) -> None:
  """Writes the trial, and its true tables beside the rows.

  Example:
    >>> prepare(Config("misspecified"), "/tmp/trial")     # doctest: +SKIP
  """
  directory = epath.Path(directory)
  people = {split: draw(config, split) for split in SPLITS}
  schema = make_schema(config, people["train"][1])
  writer = ColumnWriter(directory, schema)
  for split, (features, trial, truth) in people.items():
    block = Block(
      dense=features.astype(np.float32),
      ids={},
      lists={},
      vectors={},
      labels={},
      groups={},
      trial=trial,
    )
    writer.append(split, block)
    with (directory / f"truth_{split}.npz").open("wb") as file:
      np.savez(file, **truth)
  writer.finish(schema)


def make_schema(config: Config, trial: TrialRows) -> Schema:
  """The schema, with what the training part `trial` holds."""
  count = len(TREATMENTS)
  shares = np.bincount(trial.treatment, minlength=count) / len(trial.treatment)
  return Schema(
    features=tuple(
      Feature(f"x{i}", "dense") for i in range(config.num_features)
    ),
    labels=(),
    split=Split(by="random", valid=_SHARE, test=_SHARE),
    trial=Trial(
      treatment="treatment",
      control=TREATMENTS[0],
      response="response",
      cost="cost",
      treatments=TREATMENTS,
      propensities=tuple(map(float, shares)),
      response_mean=float(trial.response.mean()),
      response_std=float(trial.response.std()),
      cost_std=float(trial.cost.std()),
    ),
  )


def draw(config: Config, split: str):
  """Features, trial and true tables of one part."""
  part = SPLITS.index(split)
  held_out = int(_SHARE * config.num_rows)
  num = held_out if part else config.num_rows - 2 * held_out
  rng = np.random.default_rng([config.seed, 1 + part])
  x = rng.normal(size=(num, config.num_features))
  response, cost = true_tables(config.world, x)
  treatment = rng.integers(len(TREATMENTS), size=num)
  rows = np.arange(num)
  seen = response[rows, treatment] + config.noise * rng.normal(size=num)
  # Half of the people redeem what they got, at twice the expected cost.
  spent = cost[rows, treatment] * 2 * rng.integers(2, size=num)
  trial = TrialRows(
    treatment=treatment.astype(np.int32),
    response=seen.astype(np.float32),
    cost=spent.astype(np.float32),
    propensity=np.full(num, 1 / len(TREATMENTS), np.float32),
    cluster=rows.astype(np.int32),
  )
  return x, trial, {"response": response, "cost": cost}


def true_tables(
  world: str, x: Float[np.ndarray, "people features"]
) -> tuple[
  Float[np.ndarray, "people treatments"], Float[np.ndarray, "people treatments"]
]:
  """Expected response and cost of every treatment.

  Example:
    >>> response, cost = true_tables("well_specified", np.zeros((1, 5)))
    >>> response.round(2).tolist()
    [[0.0, 0.76, 1.13, 1.32]]
  """
  main, against, base, redeem, few = x[:, :5].T
  effect = 1.5 + main - against
  if world == "misspecified":
    effect = np.where(few > 1.2, 8.0 + 8.0 * against, effect)
  # Each level adds half of what the one before did.
  gain = 1.0 - np.exp(-0.7 * _LEVELS)
  response = base[:, None] + effect[:, None] * gain
  cost = 0.25 * _LEVELS * np.logaddexp(0.0, 0.5 + 0.5 * redeem)[:, None]
  return response, cost
