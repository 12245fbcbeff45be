"""Spends what a plan at one price leaves of the budget.

The plan of a price leaves less than the next step costs. Some other steps fit:
they are taken in the order of their response per cost, until none fits. That is
greedy and cannot be far off, since the rest is a single step's cost. Where
users are few, so that a step is worth a share of the whole, another start and
pairs of steps are tried too: one user's step back pays for another's.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Above, the rest is worth too little of the whole for pairs of steps.
_MAX_PAIR_USERS = 5_000
_PAIR_STEPS = 256


class Limits(NamedTuple):
  """What a plan must keep.

  Attributes:
    budget: Most that all users may cost.
    segment: Segment of each user; None if there are none.
    segment_budget: Most that each segment may cost.
    min_roi: Least response per cost of the whole plan.
    floor: Least response per cost of every step.
  """

  budget: float
  segment: Int[np.ndarray, " users"] | None = None
  segment_budget: Float[np.ndarray, " segments"] | None = None
  min_roi: float = 0.0
  floor: float = 0.0


def spend_rest(
  response: Float[np.ndarray, "treatments users"],
  cost: Float[np.ndarray, "treatments users"],
  choice: Int[np.ndarray, " users"],
  limits: Limits,
  price: Float[np.ndarray, " prices"],
) -> Int[np.ndarray, " users"]:
  """A plan within the limits, with no less response than the given one.

  Args:
    response: Gain over treatment 0; -inf where a treatment is not allowed.
    cost: At least 0, and 0 for treatment 0.
    choice: A plan that keeps the limits but for rounding.
    limits: What to keep; sums are those of NumPy in the users' order.
    price: Of a unit of cost in response, one for all or one a segment: steps
      worth about as much as they cost at it are tried in pairs.

  Returns:
    A plan to which no single step to more response can be added: by response
    per cost, or, of few users, after the one step that brings most if that
    ends better.
  """
  plan = _Plan(response, cost, choice, limits)
  plan.trim()
  if len(choice) > _MAX_PAIR_USERS:
    plan.fill()
    return plan.choice
  other = plan.copy()
  plan.fill()
  other.take_largest()
  other.fill()
  if limits.segment is not None:
    price = price[limits.segment]
  plan.exchange(price)
  other.exchange(price)
  return max(plan, other, key=lambda each: each.gain()).choice


class _Plan:
  """A plan under way, with what each user gains and costs."""

  def __init__(self, response, cost, choice, limits: Limits):
    self._response, self._cost, self._limits = response, cost, limits
    self._rows = np.arange(response.shape[1])
    self.choice = np.array(choice, np.int32)
    self._gain = response[self.choice, self._rows]
    self._spent = cost[self.choice, self._rows]

  def copy(self):
    """The same plan, to be changed apart."""
    return _Plan(self._response, self._cost, self.choice, self._limits)

  def gain(self) -> float:
    """Response beyond that of treatment 0 for all."""
    return float(self._gain.sum())

  def trim(self) -> None:
    """Takes steps of little response per cost back until the limits hold.

    A plan comes here within the limits but for the last bits of its sums.
    """
    count = 1
    while not self._is_within():
      paid = np.flatnonzero(self._spent > 0)
      worth = self._gain[paid] / self._spent[paid]
      users = paid[np.argsort(worth, kind="stable")[:count]]
      free = self._cost[:, users] == 0
      self._set(
        users, np.where(free, self._response[:, users], -np.inf).argmax(axis=0)
      )
      count *= 2

  def take_largest(self) -> None:
    """Takes the one step that brings most, of those that fit."""
    target, gain, _ = self._steps(self._rows, by_cost=False)
    user = np.where(target >= 0, gain, -np.inf).argmax()
    if target[user] >= 0:
      before = self.choice[[user]]
      self._set(self._rows[[user]], target[[user]])
      if not self._is_within():
        self._set(self._rows[[user]], before)

  def fill(self) -> None:
    """Takes steps by response per cost until none fits."""
    users = self._rows
    while users.size:
      target, gain, extra = self._steps(users)
      found = np.flatnonzero(target >= 0)
      worth = _per_cost(gain[found], extra[found])
      found = found[np.argsort(-worth, kind="stable")]
      refused = self._take(
        users[found], target[found], gain[found], extra[found]
      )
      # What does not fit now will not fit later: the room only shrinks.
      users = np.setdiff1d(users[found], refused, assume_unique=True)

  def exchange(self, price) -> None:
    """Takes pairs of steps that together fit and bring something."""
    while True:
      gain = self._response - self._gain
      extra = self._cost - self._spent
      worth = gain - price * extra
      worth[self.choice, self._rows] = -np.inf
      step = np.argsort(-worth, axis=None, kind="stable")[:_PAIR_STEPS]
      step = step[np.isfinite(worth.flat[step])]
      target, user = np.unravel_index(step, worth.shape)
      gain, extra = gain.flat[step], extra.flat[step]
      both = gain[:, None] + gain[None]
      cost = extra[:, None] + extra[None]
      fits = (both > 0) & (cost <= self._room()) & (user[:, None] != user[None])
      fits &= both >= self._limits.floor * cost
      both = np.where(fits, both, 0.0)
      before, least = self.choice.copy(), self.gain()
      if both.any():
        pair = list(np.unravel_index(both.argmax(), both.shape))
        self._set(user[pair], target[pair])
      if not self._is_within() or self.gain() <= least:
        self._set(self._rows, before)
        return
      self.fill()

  def _take(self, users, target, gain, extra):
    """Takes steps in the given order, without those that no longer fit.

    Returns:
      Users whose step fits by its own cost, but not by the rounded sums.
    """
    refused = []
    while True:
      fits = np.flatnonzero(self._fits(users, gain, extra))
      if not fits.size:
        return np.asarray(refused, np.int64)
      users, target, gain, extra = (
        x[fits] for x in (users, target, gain, extra)
      )
      taken = self._prefix(users, gain, extra)
      before = self.choice[users[taken]]
      self._set(users[taken], target[taken])
      end = len(taken)
      while not self._is_within():
        end -= 1
        self._set(users[taken[end : end + 1]], before[end : end + 1])
        refused.append(users[taken[end]])
      left = np.ones(len(users), bool)
      left[taken] = False
      users, target, gain, extra = (
        x[left] for x in (users, target, gain, extra)
      )

  def _prefix(self, users, gain, extra):
    """The longest run of steps, in their order, that fit together.

    A step too dear for its segment is passed over, one too dear for the whole
    budget ends the run.
    """
    limits, chosen = self._limits, np.arange(len(users))
    if limits.segment is not None:
      segment = limits.segment[users]
      order = np.argsort(segment, kind="stable")
      sums = np.cumsum(extra[order])
      first = np.searchsorted(segment[order], segment[order])
      before = sums[first] - extra[order][first]
      room = self._segment_room()[segment[order]]
      chosen = np.sort(order[sums - before <= room])
      # Rounding of the running sums must not pass over the first step.
      chosen = np.union1d(chosen, [0])
    too_dear = np.cumsum(extra[chosen]) > self._room()
    if limits.min_roi:
      shortfall = limits.min_roi * extra[chosen] - gain[chosen]
      too_dear |= np.cumsum(shortfall) > self._surplus()
    too_dear[0] = False
    end = int(too_dear.argmax()) if too_dear.any() else len(chosen)
    return chosen[:end]

  def _steps(self, users, by_cost: bool = True):
    """The best step of each user of those that fit; target -1 if none does."""
    best = np.zeros(len(users))
    target = np.full(len(users), -1, np.int32)
    best_gain, best_extra = np.zeros(len(users)), np.zeros(len(users))
    current, spent = self._gain[users], self._spent[users]
    whole = len(users) == len(self._rows)
    for j in range(len(self._response)):
      response, cost = self._response[j], self._cost[j]
      gain = (response if whole else response[users]) - current
      extra = (cost if whole else cost[users]) - spent
      worth = _per_cost(gain, extra) if by_cost else gain
      better = (worth > best) & self._fits(users, gain, extra)
      best = np.where(better, worth, best)
      target = np.where(better, j, target)
      best_gain = np.where(better, gain, best_gain)
      best_extra = np.where(better, extra, best_extra)
    return target, best_gain, best_extra

  def _fits(self, users, gain, extra):
    """Whether a step brings something and keeps the limits by itself."""
    limits = self._limits
    fits = (gain > 0) & (extra <= self._room())
    if limits.floor:
      fits &= gain >= limits.floor * extra
    if limits.min_roi:
      fits &= limits.min_roi * extra - gain <= self._surplus()
    if limits.segment is not None:
      fits &= extra <= self._segment_room()[limits.segment[users]]
    return fits

  def _is_within(self) -> bool:
    within = self._room() >= 0
    if self._limits.segment is not None:
      within &= bool((self._segment_room() >= 0).all())
    if self._limits.min_roi:
      within &= self._surplus() >= 0
    return within

  def _room(self) -> float:
    return float(self._limits.budget - self._spent.sum())

  def _segment_room(self):
    most = self._limits.segment_budget
    return most - np.bincount(self._limits.segment, self._spent, len(most))

  def _surplus(self) -> float:
    return self.gain() - self._limits.min_roi * float(self._spent.sum())

  def _set(self, users, target) -> None:
    self.choice[users] = target
    self._gain[users] = self._response[target, users]
    self._spent[users] = self._cost[target, users]


def _per_cost(gain, extra):
  """Response per cost of a step; infinite where it costs nothing."""
  costs = extra > 0
  free = np.where(gain > 0, np.inf, -np.inf)
  with np.errstate(over="ignore"):  # A cost near nothing.
    return np.where(costs, gain / np.where(costs, extra, 1), free)
