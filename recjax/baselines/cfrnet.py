"""CFRNet: heads on a representation that is balanced between treatments.

Source: Shalit, Johansson and Sontag, Estimating individual treatment effect:
generalization bounds and algorithms, arXiv 1606.03976; here for several
treatments, each compared with the control.

| paper | code |
| --- | --- |
| Phi(x) | the trunk, `mlp_dims` |
| h(Phi, t) | a network a treatment, `head_dims` |
| weighted factual loss | `outcomes.outcome_losses` |
| alpha IPM(Phi of the treated, Phi of the controls) | `balance_term` |
| linear MMD, RBF MMD (appendix) | `ipm`: `mmd_linear`, `mmd_rbf` |

Our choice: the mean over treatments; the weighted means of a batch; a
treatment that a batch does not hold adds nothing. In a randomised trial the
groups are alike, so that balancing costs and gains little.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import losses
from recjax.baselines import two_stage
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.outcome_network import OutcomeNetwork
from recjax.layers.outcomes import Units
from recjax.schema import Schema, suggest

IPMS = ("mmd_linear", "mmd_rbf")


@dataclasses.dataclass(frozen=True)
class Config(two_stage.Config):
  """The fields of `two_stage`, and the balance.

  Attributes:
    balance: Weight of the distance between representations (alpha).
    ipm: `mmd_linear` or `mmd_rbf`.
    rbf_sigma: Width of the second's kernel.
  """

  balance: float = 0.1
  ipm: str = "mmd_linear"
  rbf_sigma: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    self.require_learner("shared", "cfrnet")
    if self.ipm not in IPMS:
      raise UserError(
        f"unknown model.ipm {self.ipm!r}" + suggest(self.ipm, IPMS)
      )
    if not self.mlp_dims:
      raise UserError("model.mlp_dims is empty: cfrnet balances its output")
    if not 0 < self.rbf_sigma < float("inf") or not 0 <= self.balance < float(
      "inf"
    ):
      raise UserError(
        "model.balance must be at least 0 and model.rbf_sigma above 0, got "
        f"{self.balance} and {self.rbf_sigma}"
      )


class Model(nn.Module):
  """Features -> representation -> outcomes of every treatment."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    config, units = self.config, Units.of(self.schema)
    dtype = jnp.dtype(config.dtype)
    x = two_stage.trunk(
      config, self.schema, batch, rows, config.mlp_dims, train=train
    )
    raw = OutcomeNetwork(
      learner="t",
      num_treatments=self.schema.trial.num_treatments,
      outcomes=units.names,
      mlp_dims=(),
      head_dims=config.head_dims,
      dropout_rate=config.dropout_rate,
      dtype=dtype,
      name="heads",
    )(x, train=train)
    aux = {"raw": raw, "units": units, "representation": x}
    return units.predictions(raw), aux


tables = two_stage.tables


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The prediction losses, and `balance`."""
  terms = two_stage.loss_fn(predictions, aux, batch, config)
  if not config.balance:
    return terms
  x = aux["representation"].astype(jnp.float32)
  num_treatments = predictions["response"].shape[-1]
  distance = balance(x, batch, num_treatments, config)
  count = jnp.sum(batch.example_mask.astype(jnp.float32))
  return terms | {"balance": (config.balance * distance * count, count)}


def balance(
  x: Float[Array, "batch dim"],
  batch: Batch,
  num_treatments: int,
  config: Config,
) -> Float[Array, ""]:
  """Mean over treatments of the distance of their people from the controls.

  Linear MMD: `||mean of Phi - mean of Phi||^2`. RBF MMD:
  `E k(a, a') + E k(b, b') - 2 E k(a, b)` with `k = exp(-d^2 / (2 sigma^2))`.
  """
  treatment = jnp.where(batch.example_mask, batch.trial.treatment, 0)
  groups = jax.nn.one_hot(treatment, num_treatments, dtype=x.dtype)
  groups = jnp.where(batch.example_mask[:, None], groups, 0.0)
  counts = groups.sum(axis=0)
  share = groups / jnp.maximum(counts, 1.0)[None]
  if config.ipm == "mmd_linear":
    means = share.T @ x
    distances = jnp.sum(jnp.square(means[1:] - means[:1]), axis=-1)
  else:
    squares = jnp.sum(jnp.square(x), axis=-1)
    far = squares[:, None] + squares[None] - 2.0 * (x @ x.T)
    kernel = jnp.exp(-jnp.maximum(far, 0.0) / (2.0 * config.rbf_sigma**2))
    within = share.T @ kernel @ share
    own = jnp.diagonal(within)
    distances = own[1:] + own[0] - 2.0 * within[0, 1:]
  known = (counts[1:] > 0) & (counts[0] > 0)
  return jnp.mean(jnp.where(known, distances, 0.0))
