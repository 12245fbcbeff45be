"""Gradients of what a policy earns on a randomised trial.

A policy gives person i the treatment `argmax_j S_ij`. What it earns on the
trial is counted on the people whose own treatment it happens to name:

    V(S) = sum_i g_i 1[t_i = argmax_j S_ij]

with `g_i = w_i (y_i - multiplier z_i)`, response y, cost z and w the inverse
of the propensity of the treatment that i had. V is a sum over people, each of
whom counts only with its own row of S, and is piecewise constant: a gradient
is that of a smoothed V, or a rule. All functions here return dV/dS.

| source | code |
| --- | --- |
| E1: evolution strategies on the batch, antithetic | `nes` |
| E2: the same, each row weighing its draw by its own gain | `row_nes` |
| E3: Gumbel noise, for which the smoothed policy is a softmax | `softmax` |
| improved finite difference of DFCL (arXiv 2407.13664; the rule as algorithm 5
  of arXiv 2510.19517 has it) | `finite_difference` |

Gumbel noise of scale `temperature` has the standard deviation of Gaussian
noise `sigma` where `temperature = sigma sqrt(6) / pi` (`matched_temperature`).

Sources: Wierstra et al., Natural Evolution Strategies, JMLR 15 (2014); for E2
and E3 a derivation of our own from the sum above.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

ESTIMATORS = ("nes", "row_nes", "softmax", "finite_difference")
# Steps of a bisection: float32 has 24 bits of mantissa, the rest is range.
BISECTION_STEPS = 50


def value_gradient(
  estimator: str,
  scores: Float[Array, "batch treatments"],
  treatment: Int[Array, " batch"],
  gain: Float[Array, " batch"],
  *,
  sigma: Float[Array, ""],
  rng: Key[Array, ""] | None = None,
  num_draws: int = 32,
) -> Float[Array, "batch treatments"]:
  """dV/dS by one of `ESTIMATORS`.

  Args:
    estimator: Its name.
    scores: S, response minus multiplier times cost.
    treatment: What each person had.
    gain: g; 0 for a person who does not count.
    sigma: Standard deviation of the smoothing noise, in units of `scores`;
      for `finite_difference` the smallest gap that counts.
    rng: For the two that draw noise.
    num_draws: Policies that those try; even.
  """
  if estimator == "softmax":
    return softmax(scores, treatment, gain, matched_temperature(sigma))
  if estimator == "finite_difference":
    return finite_difference(scores, treatment, gain, sigma)
  return evolution_strategies(
    scores,
    treatment,
    gain,
    sigma,
    rng,
    num_draws,
    per_row=estimator == "row_nes",
  )


def evolution_strategies(
  scores: Float[Array, "batch treatments"],
  treatment: Int[Array, " batch"],
  gain: Float[Array, " batch"],
  sigma: Float[Array, ""] | float,
  rng: Key[Array, ""],
  num_draws: int,
  *,
  per_row: bool,
) -> Float[Array, "batch treatments"]:
  """E1, or E2 with `per_row`; both unbiased for Gaussian smoothing.

  `1 / (2 K sigma) sum_k [V(S + sigma e_k) - V(S - sigma e_k)] e_k` over K =
  `num_draws / 2` antithetic pairs. E1 weighs every row's noise by the whole V,
  so its error grows with the batch; E2 by the row's own part of V.
  """

  def add_pair(total, rng):
    noise = jax.random.normal(rng, scores.shape, scores.dtype)
    up = jnp.argmax(scores + sigma * noise, axis=-1) == treatment
    down = jnp.argmax(scores - sigma * noise, axis=-1) == treatment
    change = gain * (up.astype(scores.dtype) - down.astype(scores.dtype))
    if not per_row:
      change = jnp.broadcast_to(change.sum(), change.shape)
    return total + change[:, None] * noise, None

  rngs = jax.random.split(rng, num_draws // 2)
  total, _ = jax.lax.scan(add_pair, jnp.zeros_like(scores), rngs)
  return total / (num_draws * sigma)


def softmax(
  scores: Float[Array, "batch treatments"],
  treatment: Int[Array, " batch"],
  gain: Float[Array, " batch"],
  temperature: Float[Array, ""] | float,
) -> Float[Array, "batch treatments"]:
  """E3: `g_i p_i[t_i] (1[j = t_i] - p_ij) / temperature`, p the softmax."""
  probs = jax.nn.softmax(scores / temperature, axis=-1)
  chosen = jax.nn.one_hot(treatment, scores.shape[-1], dtype=scores.dtype)
  own = jnp.sum(probs * chosen, axis=-1)
  return (gain * own / temperature)[:, None] * (chosen - probs)


def finite_difference(
  scores: Float[Array, "batch treatments"],
  treatment: Int[Array, " batch"],
  gain: Float[Array, " batch"],
  min_gap: Float[Array, ""] | float,
) -> Float[Array, "batch treatments"]:
  """Change of value over the smallest change of a score that flips a row.

  Where the policy names i's treatment: `g / gap to the second best` for it and
  `-g / gap to j` for each other j. Where it names another: `g / gap` for i's
  treatment and `-g / gap` for the one that is named.

  Args:
    scores: S.
    treatment: What each person had.
    gain: g.
    min_gap: Gaps below it count as it, which bounds the gradient.
  """
  count = scores.shape[-1]
  own_mask = jax.nn.one_hot(treatment, count, dtype=scores.dtype)
  best = jnp.argmax(scores, axis=-1)
  best_mask = jax.nn.one_hot(best, count, dtype=scores.dtype)
  own = jnp.sum(scores * own_mask, axis=-1, keepdims=True)
  gaps = jnp.maximum(jnp.abs(own - scores), min_gap)
  inverse = gain[:, None] / gaps
  # Matched: each rival that rises over its gap takes the row away.
  rivals = inverse * (1.0 - own_mask)
  nearest = jnp.min(jnp.where(own_mask > 0, jnp.inf, gaps), axis=-1)
  matched = (gain / nearest)[:, None] * own_mask - rivals
  top_gap = jnp.sum(inverse * best_mask, axis=-1, keepdims=True)
  missed = top_gap * (own_mask - best_mask)
  return jnp.where((best == treatment)[:, None], matched, missed)


def matched_temperature(sigma: Float[Array, ""] | float):
  """Temperature of the Gumbel noise whose standard deviation is `sigma`."""
  return sigma * (math.sqrt(6.0) / math.pi)


def spread(
  scores: Float[Array, "batch treatments"], mask: Bool[Array, " batch"]
) -> Float[Array, ""]:
  """Standard deviation of the scores about the mean of their row.

  What is common to a row moves no choice, so it is left out (our choice).
  """
  centred = scores - scores.mean(axis=-1, keepdims=True)
  total = jnp.sum(jnp.where(mask[:, None], jnp.square(centred), 0.0))
  count = jnp.maximum(mask.sum(), 1) * scores.shape[-1]
  return jnp.sqrt(total / count)


def solve_multiplier(
  response: Float[Array, "batch treatments"],
  cost: Float[Array, "batch treatments"],
  budget: Float[Array, ""],
  mask: Bool[Array, " batch"],
) -> Float[Array, ""]:
  """The least multiplier at which the batch spends at most `budget` a head.

  Bisection on the price of a unit of cost: at a price each person takes
  `argmax_j response - price cost`, and what they spend falls as it rises.

  Args:
    response: Predicted response.
    cost: Predicted cost, at least 0.
    budget: Mean cost a person; at least the mean of the cheapest treatments.
    mask: People who count.

  Returns:
    0 where the budget does not bind.
  """
  # Above the steepest rise of any row everyone takes the cheapest treatment.
  cheapest = jnp.argmin(cost, axis=-1)[:, None]
  rise = response - jnp.take_along_axis(response, cheapest, axis=-1)
  more = cost - jnp.take_along_axis(cost, cheapest, axis=-1)
  slope = jnp.where(
    (more > 0) & (rise > 0), rise / jnp.where(more > 0, more, 1), 0
  )
  high = jnp.max(jnp.where(mask[:, None], slope, 0.0)) * 1.001

  def halve(_, ends):
    low, high = ends
    middle = 0.5 * (low + high)
    fits = mean_cost(response, cost, middle, mask) <= budget
    return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

  free = mean_cost(response, cost, jnp.float32(0.0), mask) <= budget
  _, high = jax.lax.fori_loop(
    0, BISECTION_STEPS, halve, (jnp.zeros_like(high), high)
  )
  return jnp.where(free, 0.0, high)


def budgets_per_head(
  cost: Float[Array, "batch treatments"],
  mask: Bool[Array, " batch"],
  shares: tuple[float, ...],
) -> Float[Array, " budgets"]:
  """Mean costs between those of the cheapest and the dearest treatment."""
  means = jnp.sum(jnp.where(mask[:, None], cost, 0.0), axis=0)
  means = means / jnp.maximum(mask.sum(), 1)
  low, high = means.min(), means.max()
  return low + jnp.asarray(shares, jnp.float32) * (high - low)


def mean_cost(
  response: Float[Array, "batch treatments"],
  cost: Float[Array, "batch treatments"],
  multiplier: Float[Array, ""],
  mask: Bool[Array, " batch"],
) -> Float[Array, ""]:
  """What a person spends on average at a price; falls as the price rises."""
  choice = jnp.argmax(response - multiplier * cost, axis=-1)
  spent = jnp.take_along_axis(cost, choice[:, None], axis=-1)[:, 0]
  return jnp.sum(jnp.where(mask, spent, 0.0)) / jnp.maximum(mask.sum(), 1)


def surrogate(
  value: Float[Array, ""],
  gradient: Float[Array, "batch treatments"],
  scores: Float[Array, "batch treatments"],
) -> Float[Array, ""]:
  """`value`, with `gradient` for its derivative by `scores`."""
  slope = jnp.sum(jax.lax.stop_gradient(gradient) * scores)
  return jax.lax.stop_gradient(value) + slope - jax.lax.stop_gradient(slope)
