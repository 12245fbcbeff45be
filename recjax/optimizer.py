"""Dense and row-sparse optimisers from one config block.

The learning rate of both is `base * factor(step)`, where the factor warms up
linearly from `warmup_from` to 1 over `warmup_steps` (MSN trains its first
50,000 steps so, from 0.1 %) and then stays or falls as a cosine.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pallas_kernels.row_update.optimizers import Rule
from recjax.errors import UserError
from recjax.schema import suggest

SPARSE = ("rowwise_adagrad", "adagrad", "lazy_adam", "sgd")
DENSE = ("adamw", "rmsprop", "adagrad", "sgd")
SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class SparseConfig:
  """Optimiser of the row-sparse tables.

  The optimisers are defined in `pallas_kernels.row_update.optimizers`.

  Attributes:
    name: `rowwise_adagrad`, `adagrad`, `lazy_adam` or `sgd`.
    learning_rate: Base step size.
    weight_decay: L2 pull on touched rows.
    clip_norm: Largest norm of a row's gradient; None for no limit.
    eps: Guards the division by the root of the second moment.
  """

  name: str = "rowwise_adagrad"
  learning_rate: float = 0.02
  weight_decay: float = 0.0
  clip_norm: float | None = None
  eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class Config:
  """How parameters move.

  Attributes:
    name: Dense optimiser: `adamw`, `rmsprop`, `adagrad` or `sgd`.
    learning_rate: Base step size of the dense parameters.
    weight_decay: Decoupled decay of dense matrices (not of biases and gains).
    clip_norm: Largest global norm of the dense gradient; None for no limit.
    schedule: `constant` or `cosine` (to 0 at the stage's end).
    warmup_steps: Steps of the linear warm-up; 0 for none.
    warmup_from: Factor at the first step of the warm-up.
    ema_decay: Decay of the average of dense parameters that evaluation uses;
      0 for none.
    scale_rules: `regex=factor` words; the first that matches a parameter or
      table path multiplies its learning rate (0 freezes it).
    sparse: Optimiser of the tables.
  """

  name: str = "adamw"
  learning_rate: float = 1e-3
  weight_decay: float = 0.0
  clip_norm: float | None = 10.0
  schedule: str = "constant"
  warmup_steps: int = 0
  warmup_from: float = 1e-3
  ema_decay: float = 0.0
  scale_rules: tuple[str, ...] = ()
  sparse: SparseConfig = SparseConfig()

  def __post_init__(self):
    _check_choice("optimizer.name", self.name, DENSE)
    _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
    if not 0 <= self.ema_decay < 1:
      raise UserError(
        f"optimizer.ema_decay must lie in [0, 1), got {self.ema_decay}"
      )
    for name, rate in (
      ("optimizer", self.learning_rate),
      ("optimizer.sparse", self.sparse.learning_rate),
    ):
      if not 0 < rate < math.inf:
        raise UserError(
          f"{name}.learning_rate must be above 0 and finite, got {rate}"
        )
    for name, block in (("", self), ("sparse.", self.sparse)):
      _check_number(f"{name}weight_decay", block.weight_decay)
      if block.clip_norm is not None and not block.clip_norm > 0:
        raise UserError(
          f"optimizer.{name}clip_norm must be above 0, or None for no limit, "
          f"got {block.clip_norm}"
        )
    for name in ("warmup_steps", "warmup_from"):
      _check_number(name, getattr(self, name))
    for rule in self.scale_rules:
      _parse_rule(rule)
    _check_choice("optimizer.sparse.name", self.sparse.name, SPARSE)


def make_dense_optimizer(
  config: Config, params: Any, trainable: tuple[str, ...], num_steps: int
) -> optax.GradientTransformation:
  """The dense optimiser of one stage.

  Args:
    config: The optimiser block.
    params: Parameters, for their paths; shape structs will do.
    trainable: What a stage trains; the rest receives no update at all.
    num_steps: Length of the stage, for the schedule.
  """
  scales = jax.tree_util.tree_map_with_path(
    lambda path, _: learning_rate_scale(config, path_name(path), trainable),
    params,
  )
  transforms = {
    scale: _rule(config, scale, num_steps) if scale else optax.set_to_zero()
    for scale in set(jax.tree.leaves(scales))
  }
  steps = []
  if config.clip_norm is not None:
    frozen = jax.tree.map(lambda scale: scale == 0, scales)
    # What is frozen must not count in the global norm.
    steps.append(optax.masked(optax.set_to_zero(), frozen))
    steps.append(optax.clip_by_global_norm(config.clip_norm))
  return optax.chain(*steps, optax.partition(transforms, scales))


def make_update_rule(config: Config) -> Rule:
  """How touched rows move."""
  sparse = config.sparse
  return Rule(
    optimizer=sparse.name,
    eps=sparse.eps,
    weight_decay=sparse.weight_decay,
    clip_norm=sparse.clip_norm,
  )


def factor(
  config: Config, num_steps: int
) -> Callable[[Array], Float[Array, ""]]:
  """Step (from 0) -> what multiplies the base learning rates."""

  def value(step: Array) -> Float[Array, ""]:
    step = jnp.asarray(step, jnp.float32)
    scale = jnp.float32(1.0)
    if config.schedule == "cosine":
      progress = jnp.clip(step / max(num_steps, 1), 0.0, 1.0)
      scale = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    if config.warmup_steps:
      part = jnp.minimum(step / config.warmup_steps, 1.0)
      scale *= config.warmup_from + (1.0 - config.warmup_from) * part
    return scale

  return value


def learning_rate_scale(
  config: Config, path: str, trainable: tuple[str, ...]
) -> float:
  """Multiplier of the learning rate at `path`; 0 means frozen."""
  if not any(re.fullmatch(rule, path) for rule in trainable):
    return 0.0
  for rule in config.scale_rules:
    pattern, scale = _parse_rule(rule)
    if re.fullmatch(pattern, path):
      return scale
  return 1.0


def path_name(path) -> str:
  """`heads/click/kernel` from a pytree path."""
  return "/".join(str(getattr(key, "key", key)) for key in path)


def _rule(config: Config, scale: float, num_steps: int):
  scale_of = factor(config, num_steps)
  rate = lambda step: scale * config.learning_rate * scale_of(step)  # noqa: E731
  if config.name == "adamw":
    return optax.adamw(rate, weight_decay=config.weight_decay, mask=_is_matrix)
  optimizers = {
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "sgd": optax.sgd,
  }
  return optax.chain(
    optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
    optimizers[config.name](rate),
  )


def _is_matrix(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)


def _parse_rule(rule: str) -> tuple[str, float]:
  pattern, sign, scale = rule.rpartition("=")
  try:
    if not sign:
      raise ValueError("no '='")
    re.compile(pattern)
    if not 0 <= float(scale) < math.inf:
      raise ValueError("the factor must be a finite number from 0")
    return pattern, float(scale)
  except (ValueError, re.error) as error:
    raise UserError(
      f"optimizer.scale_rules: {rule!r} is not of the form regex=factor "
      f"({error}); write for example 'heads/.*=0.1'"
    ) from error


def _check_number(name: str, value: float | int):
  if not 0 <= value < math.inf:
    raise UserError(
      f"optimizer.{name} must be a finite number from 0, got {value}"
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]):
  if value not in choices:
    raise UserError(f"unknown {name} {value!r}" + suggest(value, choices))
