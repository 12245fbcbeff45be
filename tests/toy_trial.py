"""A small randomised trial for tests of methods: schema and random batches."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from recjax import method as method_lib
from recjax.batch import Batch, TrialRows
from recjax.layers.outcomes import Units
from recjax.schema import Schema
from recjax.trial import Trial
from tests import toy


def make_schema(**trial) -> Schema:
  """Features of `toy.SCHEMA`, and a trial of three treatments."""
  fields = {
    "treatments": ("none", "mail", "call"),
    "propensities": (0.5, 0.3, 0.2),
    "response_mean": 1.5,
    "response_std": 2.0,
    "cost_std": 0.7,
    "cost": "cost",
  }
  trial = Trial("arm", "none", "spend", **fields | trial)
  return dataclasses.replace(toy.SCHEMA, labels=(), trial=trial)


SCHEMA = make_schema()
BINARY = make_schema(is_binary=True, response_mean=0.4, response_std=0.5)
KNOWN_COST = make_schema(
  cost=None, arm_cost={"none": 0.0, "mail": 0.3, "call": 1.0}
)


def is_trial(name: str) -> bool:
  """Whether the method `name` learns from a trial: its config has no tasks."""
  fields = dataclasses.fields(method_lib.find_module(name).Config)
  return "tasks" not in [field.name for field in fields]


def units(**trial) -> Units:
  """The units of a trial of these statistics."""
  return Units.of(make_schema(**trial))


def make_batch(
  seed: int = 0, size: int = 16, num_padding: int = 0, binary: bool = False
) -> Batch:
  """Random people; response and cost depend on user, item and treatment."""
  batch = toy.make_batch(seed, size, num_padding)
  rng = np.random.default_rng(100 + seed)
  propensity = np.asarray(SCHEMA.trial.propensities)
  treatment = rng.choice(3, p=propensity, size=size)
  click = np.asarray(batch.labels["click"])
  response = click * (1 + treatment) + 0.1 * rng.normal(size=size)
  if binary:
    response = (rng.random(size) < 0.2 + 0.6 * click).astype(float)
  valid = np.asarray(batch.example_mask)
  return batch.replace(
    labels={},
    label_mask={},
    real_labels=frozenset(),
    trial=TrialRows(
      treatment=jnp.asarray(treatment * valid, jnp.int32),
      response=jnp.asarray(response * valid, jnp.float32),
      cost=jnp.asarray(treatment * (0.3 + 0.2 * click) * valid, jnp.float32),
      propensity=jnp.asarray(propensity[treatment] * valid, jnp.float32),
      cluster=jnp.arange(size, dtype=jnp.int32) * valid,
    ),
  )
