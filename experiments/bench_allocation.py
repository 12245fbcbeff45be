r"""Measures how fast `recjax.allocation` plans, beside HiGHS.

    python -m experiments.bench_allocation [--num_users=1000,10000,1000000]

Plans for random tables of each size, in turns with the linear relaxation solved
by HiGHS (through SciPy) where the size is at most `--highs_up_to`, in one
process. First checks the plans: never above the budget, the bound equal to
HiGHS's optimum to 1e-6, the value short of it by less than 5e-4 at 1,000 users
and 1e-4 from 10,000 on. Prints a line a size, and the same as JSON; exits with
code 1 if a plan fails a check or is less than 20 times as fast as HiGHS at
10,000 users. Compiling is not timed: the first plan of each size is not
counted.
"""

import json
import statistics
import sys
import time

import jax
import numpy as np
import scipy
import scipy.optimize
import scipy.sparse
from absl import flags

from experiments import door
from recjax import allocation
from recjax.errors import UserError

_NUM_USERS = flags.DEFINE_list(
  "num_users", ["1000", "10000", "1000000"], "Users of each table."
)
_NUM_TREATMENTS = flags.DEFINE_integer(
  "num_treatments", 10, "Treatments, none among them."
)
_HIGHS_UP_TO = flags.DEFINE_integer(
  "highs_up_to", 10_000, "Most users that HiGHS is timed with."
)
_SHARE = flags.DEFINE_float(
  "share", 0.1, "Budget, as a share of what the dearest treatments cost."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed plans of each size.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the tables.")

MIN_SPEEDUP = 20
MAX_BOUND_ERROR = 1e-6


def main(argv) -> None:
  """Runs the benchmark."""
  del argv
  try:
    sizes = sorted({int(size) for size in _NUM_USERS.value})
  except ValueError:
    sizes = []
  if not sizes or sizes[0] < 1 or _NUM_TREATMENTS.value < 2:
    raise UserError(
      "--num_users must be whole numbers of at least 1, such as 1000,10000, "
      f"got {','.join(_NUM_USERS.value)}, and --num_treatments at least 2"
    )
  rows = [measure(size) for size in sizes]
  print(
    f"{'users':>10}{'plan':>12}{'HiGHS':>12}{'faster':>9}{'gap':>11}"
    f"{'bound error':>13}"
  )
  for row in rows:
    speedup, error = (row[name] for name in ("speedup", "bound_error"))
    print(
      f"{row['num_users']:>10,}{1e3 * row['plan_secs']:>9.1f} ms"
      + (f"{1e3 * row['highs_secs']:>9.0f} ms" if speedup else f"{'-':>12}")
      + (f"{speedup:>8.0f}x" if speedup else f"{'-':>9}")
      + f"{row['gap']:>11.1e}"
      + (f"{error:>13.1e}" if speedup else f"{'-':>13}")
    )
  print(
    json.dumps(
      {
        "sizes": rows,
        "num_treatments": _NUM_TREATMENTS.value,
        "share": _SHARE.value,
        "repeats": _REPEATS.value,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "scipy": scipy.__version__,
      }
    )
  )
  failures = [text for row in rows for text in row["failures"]]
  for text in failures:
    print(f"failed: {text}", file=sys.stderr)
  sys.exit(int(bool(failures)))


def measure(num_users: int) -> dict[str, object]:
  """Times plans and HiGHS in turns on one table, and checks the plan."""
  rng = np.random.default_rng(_SEED.value)
  shape = (num_users, _NUM_TREATMENTS.value)
  response, cost = rng.random(shape), rng.random(shape)
  cost[:, 0] = 0
  budget = _SHARE.value * float(cost.max(axis=1).sum())
  plan = allocation.allocate(response, cost, budget)  # Compiles.
  plan_secs, highs_secs, optimum = [], [], None
  for i in range(_REPEATS.value):
    start = time.perf_counter()
    allocation.allocate(response, cost, budget)
    plan_secs.append(time.perf_counter() - start)
    if num_users <= _HIGHS_UP_TO.value and i < 2:
      start = time.perf_counter()
      optimum = relaxation(response, cost, budget)
      highs_secs.append(time.perf_counter() - start)
  row = {
    "num_users": num_users,
    "plan_secs": statistics.median(plan_secs),
    "highs_secs": min(highs_secs, default=None),
    "speedup": None,
    "gap": 1 - plan.value / plan.upper_bound,
    "bound_error": None,
    "spend": plan.spend,
    "budget": budget,
  }
  if optimum is not None:
    row["speedup"] = row["highs_secs"] / row["plan_secs"]
    row["bound_error"] = abs(plan.upper_bound / optimum - 1)
  return row | {"failures": check(row)}


def check(row) -> list[str]:
  """What a plan promises and does not keep."""
  size, failures = row["num_users"], []
  if row["spend"] > row["budget"]:
    failures.append(f"{size} users: spent {row['spend']} of {row['budget']}")
  allowed = 1e-4 if size >= 10_000 else 5e-4
  if size >= 1_000 and row["gap"] > allowed:
    failures.append(f"{size} users: {row['gap']:.1e} below the bound")
  if row["bound_error"] is not None and row["bound_error"] > MAX_BOUND_ERROR:
    failures.append(f"{size} users: bound off by {row['bound_error']:.1e}")
  if size == 10_000 and row["speedup"] and row["speedup"] < MIN_SPEEDUP:
    failures.append(f"{size} users: only {row['speedup']:.1f} times as fast")
  return failures


def relaxation(response, cost, budget: float) -> float:
  """Optimum of the linear relaxation by HiGHS."""
  num_users, num_treatments = response.shape
  one_each = scipy.sparse.kron(
    scipy.sparse.eye(num_users), np.ones((1, num_treatments)), format="csr"
  )
  result = scipy.optimize.linprog(
    -response.ravel(),
    A_ub=scipy.sparse.csr_matrix(cost.ravel()[None]),
    b_ub=[budget],
    A_eq=one_each,
    b_eq=np.ones(num_users),
    bounds=(0, 1),
    method="highs",
  )
  return -result.fun


if __name__ == "__main__":
  door.run(main)
