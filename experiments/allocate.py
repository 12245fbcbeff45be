"""Writes a spend plan for a population with the model of a finished run.

    python -m experiments.allocate --workdir=runs/budget \\
        --population=people.parquet --budget=50000 --out=plan.parquet

`plan.parquet` has one row a person in the order of the input: the columns that
are no features (a customer's number), `treatment` by its own name, and the
expected response and cost. Beside it comes a picture, `plan.png`: value
against budget.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import door
from recjax import plan as plan_lib
from recjax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
_POPULATION = flags.DEFINE_string(
  "population", None, "Parquet or CSV file with the columns of the features."
)
_BUDGET = flags.DEFINE_float("budget", None, "What may be spent in all.")
_OUT = flags.DEFINE_string("out", None, "Parquet file to write.")
_BOOTSTRAP = flags.DEFINE_integer(
  "bootstrap", 1000, "Draws behind each interval.", lower_bound=10
)


def main(argv: Sequence[str]) -> None:
  """Writes the plan and prints what it will bring."""
  del argv
  missing = [
    f"--{flag.name}"
    for flag in (_WORKDIR, _POPULATION, _BUDGET, _OUT)
    if flag.value in (None, "")
  ]
  if missing:
    raise UserError(
      f"{' and '.join(missing)} missing; for example --workdir=runs/budget "
      "--population=people.parquet --budget=50000 --out=plan.parquet"
    )
  out = pathlib.Path(_OUT.value).expanduser()
  if out.suffix != ".parquet":
    raise UserError(f"--out must end in .parquet, got {out}")
  for path in (out, out.with_suffix(".png")):
    if path.exists():
      raise UserError(f"{path}: exists; give another --out")
  plan = plan_lib.make_plan(
    _WORKDIR.value,
    _POPULATION.value,
    _BUDGET.value,
    num_bootstrap=_BOOTSTRAP.value,
  )
  plan_lib.write_plan(plan, out)
  for line in describe(plan):
    print(line)
  print(f"wrote {out} and {out.with_suffix('.png')}")


def describe(plan: plan_lib.Plan) -> list[str]:
  """The lines that are printed."""
  s = plan.summary
  share = s["gap"] / abs(s["upper_bound"]) if s["upper_bound"] else 0.0
  counts = plan.people["treatment"].value_counts().to_pylist()
  counts = sorted(counts, key=lambda entry: -entry["counts"])
  given = ", ".join(f"{e['values']} {e['counts']}" for e in counts)
  return [
    f"people {s['people']:.0f}: {given}",
    f"budget {s['budget']:.2f}",
    f"spend expected by the model {s['expected_spend']:.2f}; by the held-out "
    f"trial {_interval(s, 'spend')}",
    f"value expected by the model {s['expected_value']:.2f}; by the held-out "
    f"trial {_interval(s, 'value')}",
    f"value of no treatment by the model {s['value_of_none']:.2f}; by the "
    f"held-out trial {s['held_out_value_of_none']:.2f}",
    f"certificate: no plan has more than {s['upper_bound']:.2f} by the model; "
    f"gap {s['gap']:.4f} ({share:.4%})",
    f"one more unit of budget brings {s['multiplier']:.4f}",
  ]


def _interval(summary: dict[str, float], name: str) -> str:
  low, high = (summary[f"held_out_{name}_{end}"] for end in ("low", "high"))
  return f"{summary[f'held_out_{name}']:.2f} (95 %: {low:.2f} to {high:.2f})"


if __name__ == "__main__":
  door.run(main)
