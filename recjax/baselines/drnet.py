"""DRNet-style: the level of the incentive enters every layer of its head.

Source: Schwab et al., Learning counterfactual representations for estimating
individual dose-response curves, arXiv 1902.00981. There a treatment has a
dosage, the range of dosages is cut into E strata with a head each, and the
dosage is given to every hidden layer of a head. Here the treatments are the
levels of one incentive.

| paper | code |
| --- | --- |
| base layers | the trunk, `mlp_dims` |
| dosage s | place of the treatment in the schema over the last, in [0, 1] |
| E dosage strata | `num_strata`; heads `head_dims` |
| dosage at every hidden layer | `StratumDense` |

Our choice: "style", for what a coupon has and a drug has not: no treatment
layers, and the control is dosage 0 of the first stratum.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from recjax.baselines import two_stage
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.dropout import Dropout
from recjax.layers.outcomes import Units
from recjax.layers.per_token import KERNEL_INIT
from recjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Config(two_stage.Config):
  """The fields of `two_stage`, and the strata.

  Attributes:
    num_strata: Heads, each for an equal part of the levels (E).
  """

  num_strata: int = 2

  def __post_init__(self):
    super().__post_init__()
    self.require_learner("shared", "drnet")
    if self.num_strata < 1:
      raise UserError(
        f"model.num_strata must be at least 1, got {self.num_strata}"
      )


class Model(nn.Module):
  """Features -> trunk -> the head of each treatment's stratum."""

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
    dosage = dosages(self.schema.trial.num_treatments)
    x = jnp.broadcast_to(x[None], (len(dosage), *x.shape))
    for i, width in enumerate(config.head_dims):
      x = StratumDense(width, config.num_strata, dtype, name=f"head_{i}")(
        x, dosage
      )
      x = Dropout(config.dropout_rate, deterministic=not train)(nn.relu(x))
    out = StratumDense(
      len(units.names), config.num_strata, jnp.float32, name="outcomes"
    )(x, dosage)
    raw = {name: out[..., i].T for i, name in enumerate(units.names)}
    return units.predictions(raw), {"raw": raw, "units": units}


class StratumDense(nn.Module):
  """`y_t = [x_t, s_t] W + b` with the weights of the stratum of dosage s_t.

  Attributes:
    features: Output width.
    num_strata: Sets of weights.
    dtype: Type of the computation; parameters are float32.
  """

  features: int
  num_strata: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "treatments batch dim"],
    dosage: Float[np.ndarray, " treatments"],
  ) -> Float[Array, "treatments batch features"]:
    level = jnp.asarray(dosage, x.dtype)[:, None, None]
    level = jnp.broadcast_to(level, (*x.shape[:2], 1))
    x = jnp.concatenate([x, level], axis=-1)
    used, stratum = strata(dosage, self.num_strata)
    kernel = self.param(
      "kernel", KERNEL_INIT, (used, x.shape[-1], self.features)
    )
    bias = self.param("bias", nn.initializers.zeros, (used, 1, self.features))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return jnp.einsum("tbi,tio->tbo", x, kernel[stratum]) + bias[stratum]


tables = two_stage.tables
loss_fn = two_stage.loss_fn


def dosages(num_treatments: int) -> Float[np.ndarray, " treatments"]:
  """0 for the control to 1 for the last level, in equal steps."""
  return np.linspace(0.0, 1.0, num_treatments, dtype=np.float32)


def strata(dosage: Float[np.ndarray, " treatments"], num_strata: int):
  """How many strata hold a dosage, and the stratum of each dosage."""
  stratum = np.minimum((dosage * num_strata).astype(int), num_strata - 1)
  found, stratum = np.unique(stratum, return_inverse=True)
  return len(found), stratum
