"""What `allocation.allocate` is given, checked and in float64."""

import numpy as np

from recjax.errors import UserError


def read_tables(response, cost, allowed):
  """Both tables in float64, treatments first; -inf where not allowed."""
  response, cost = np.asarray(response), np.asarray(cost)
  if response.ndim != 2 or response.shape != cost.shape or not response.size:
    raise UserError(
      "response and cost must be tables [users, treatments] of one shape with "
      f"at least one user, got {response.shape} and {cost.shape}"
    )
  response, cost = _transpose(response), _transpose(cost)
  _require(np.isfinite(response), response, "response", "must be finite")
  _require(
    np.isfinite(cost) & (cost >= 0),
    cost,
    "cost",
    "must be finite and at least 0; clip what is below",
  )
  _require(
    cost[:1] == 0,
    cost,
    "cost",
    "must be 0, since treatment 0 is none; take its cost off all treatments of "
    "the user and off the budget",
  )
  if allowed is not None:
    allowed = np.asarray(allowed)
    if allowed.shape != response.shape[::-1]:
      raise UserError(
        f"allowed must have the shape {response.shape[::-1]} of response, got "
        f"{allowed.shape}"
      )
    _require(
      allowed.T[:1],
      allowed.T,
      "allowed",
      "must be True: a user may always get none",
    )
    response = np.where(allowed.T, response, -np.inf)
  return response, cost


def _transpose(table):
  """A float64 copy with a row for each treatment."""
  out = np.empty(table.shape[::-1], np.float64)
  for start in range(0, len(table), 1 << 12):  # Blocks that fit in the cache.
    out[:, start : start + (1 << 12)] = table[start : start + (1 << 12)].T
  return out


def _require(good, values, name: str, rule: str):
  if not good.all():
    treatment, user = (int(x[0]) for x in np.nonzero(~good))
    raise UserError(
      f"{name}[{user}, {treatment}] is {values[treatment, user]}: it {rule}"
    )


def read_budgets(budget, segment_budget):
  """One budget or a vector of them; no limit where segments have theirs."""
  if budget is None:
    if segment_budget is None:
      raise UserError("budget is None: give it, or segment_budget")
    budget = np.inf
  budgets = np.asarray(budget, np.float64)
  if budgets.ndim > 1 or not budgets.size:
    raise UserError(
      f"budget must be a number or a vector, got the shape {budgets.shape}"
    )
  if not (budgets >= 0).all():
    wrong = budgets[~(budgets >= 0)].flat[0]
    raise UserError(
      f"budget {wrong} is not at least 0: no plan keeps it, since even none "
      "costs 0"
    )
  return budgets


def read_segments(segment, segment_budget, num_users: int):
  """Segment of each user and budget of each segment; None without any."""
  if (segment is None) != (segment_budget is None):
    raise UserError("segment and segment_budget go together: give both")
  if segment is None:
    return None, None
  segment = np.asarray(segment)
  segment_budget = np.asarray(segment_budget, np.float64)
  if segment.shape != (num_users,) or segment_budget.ndim != 1:
    raise UserError(
      f"segment must be a vector of {num_users} numbers and segment_budget a "
      f"vector, got the shapes {segment.shape} and {segment_budget.shape}"
    )
  if segment.min() < 0 or segment.max() >= len(segment_budget):
    raise UserError(
      f"segment must be from 0 to {len(segment_budget) - 1}, the number of "
      f"segment budgets less one, got {segment.min()} to {segment.max()}"
    )
  if not (segment_budget >= 0).all():
    wrong = int(np.flatnonzero(~(segment_budget >= 0))[0])
    raise UserError(
      f"segment_budget[{wrong}] is {segment_budget[wrong]}: it must be at "
      "least 0"
    )
  return segment.astype(np.int32), segment_budget


def read_positive(name: str, value: float | None, default: float) -> float:
  """A number above 0; `default` for None."""
  if value is None:
    return default
  if not 0 < value < np.inf:
    raise UserError(f"{name} must be above 0 and finite, got {value}")
  return float(value)
