"""The state of a training and the one step that moves it.

`train_step` is pure and knows no device: sums and weights are added over
`axis_name` where one is given (`pmap`), and by the compiler under a sharded
`jit`. `recjax.parallel` wraps it.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.row_update.optimizers import make_row_optimizer
from recjax import optimizer as optimizer_lib
from recjax.batch import Batch
from recjax.method import Method, Stage
from recjax.sparse.update import (
  RowGradients,
  apply_row_gradients,
  apply_writes,
)

Scalars = dict[str, tuple[Array, Array]]


@typing.no_type_check  # Holds shardings and shape structs as well as arrays.
@struct.dataclass
class TrainState:
  """Everything that training changes.

  Attributes:
    step: Updates so far, over all stages.
    params: Linen parameters, float32.
    opt_state: State of the dense optimiser; new in every stage.
    ema_params: Running average of `params`, or None.
    tables: Row-sparse tables as stored, trained ones and banks.
    table_states: Optimiser state per trained table.
    num_skipped: Batches left out because they were not finite.
    rng: Key data of the run's seed, for dropout and the like; never changes.
  """

  step: Int[Array, ""]
  params: Any
  opt_state: Any
  ema_params: Any
  tables: dict[str, Array]
  table_states: dict[str, dict[str, Array]]
  num_skipped: Int[Array, ""]
  # Data and no constant of the step: seeds share one compiled program.
  rng: UInt32[Array, " words"]

  @property
  def eval_params(self) -> Any:
    """What evaluation uses: the average where there is one."""
    return self.params if self.ema_params is None else self.ema_params


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What a step of one stage is made of; static under `jit`.

  Attributes:
    method: Model, loss and tables.
    stage: What is trained now.
    optimizer: The optimiser block.
    num_steps: Steps of the stage.
    first_step: `TrainState.step` at the stage's start.
  """

  method: Method
  stage: Stage
  optimizer: optimizer_lib.Config
  num_steps: int
  first_step: int = 0

  def dense_optimizer(self, params: Any) -> optax.GradientTransformation:
    """The dense optimiser for these parameters."""
    return optimizer_lib.make_dense_optimizer(
      self.optimizer, params, self.stage.trainable, self.num_steps
    )

  def table_scale(self, name: str) -> float:
    """Multiplier of a table's learning rate; 0 means frozen."""
    table = self.method.tables[name]
    if not table.trained:
      return 0.0
    return table.learning_rate_scale * optimizer_lib.learning_rate_scale(
      self.optimizer, name, self.stage.trainable
    )


def init_state(rng: Array, config: StepConfig) -> TrainState:
  """A fresh state; jit it with shardings, so that it is born where it lives."""
  params, tables = config.method.init(rng)
  rule = optimizer_lib.make_update_rule(config.optimizer)
  row_optimizer = make_row_optimizer(rule.optimizer)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=config.dense_optimizer(params).init(params),
    ema_params=(
      jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    ),
    tables=tables,
    table_states={
      name: row_optimizer.init(*table.shape)
      for name, table in config.method.tables.items()
      if table.trained
    },
    num_skipped=jnp.int32(0),
    rng=jax.random.key_data(rng),
  )


def start_stage(state: TrainState, config: StepConfig) -> TrainState:
  """The state at the begin of a later stage: a new dense optimiser state."""
  if config.stage.initialize_from == "scratch":
    fresh = init_state(
      jax.random.fold_in(_key(state), config.first_step), config
    )
    return fresh.replace(
      step=state.step, num_skipped=state.num_skipped, rng=state.rng
    )
  if config.stage.empty_banks:
    empty = {
      name: jnp.zeros_like(state.tables[name])
      for name, table in config.method.tables.items()
      if not table.trained
    }
    state = state.replace(tables=state.tables | empty)
  optimizer = config.dense_optimizer(state.params)
  return state.replace(
    # The best state of the stage before is older than its last.
    step=jnp.full_like(state.step, config.first_step),
    opt_state=optimizer.init(state.params),
  )


def train_step(
  state: TrainState,
  batch: Batch,
  config: StepConfig,
  *,
  axis_name: str | None = None,
) -> tuple[TrainState, Scalars]:
  """One update.

  A step whose loss or gradient is not finite changes nothing but the counts;
  the loop decides whether to stop.

  Args:
    state: Donate it.
    batch: One batch (the device's share under `pmap`).
    config: Static.
    axis_name: Name of the device axis under `pmap`.

  Returns:
    The new state, and (sum, weight) pairs: every loss term, `loss`,
    `grad_norm` and `skipped`.
  """
  axis_sum = _axis_sum(axis_name)
  terms, gradients = loss_and_gradients(state, batch, config, axis_name)
  terms = axis_sum(terms)
  param_grads = axis_sum(gradients["params"])
  reads = _gather(gradients["row_grads"], axis_name)

  loss = sum(
    total / jnp.maximum(weight, 1.0) for total, weight in terms.values()
  )
  grad_norm = optax.tree.norm(param_grads)
  row_norms = [
    jnp.sum(jnp.abs(x))
    for read in reads.values()
    for x in (read.grads, read.weights)
    if x is not None
  ]
  ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm + sum(row_norms))

  optimizer = config.dense_optimizer(state.params)
  updates, opt_state = optimizer.update(
    param_grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  keep = lambda new, old: jax.tree.map(  # noqa: E731
    lambda n, o: jnp.where(ok, n, o), new, old
  )
  params = keep(params, state.params)
  tables, table_states = _update_tables(state, reads, ok, config)
  tables |= apply_writes(
    tables,
    _gather(gradients["writes"], axis_name),
    tables=config.method.tables,
    step=state.step + 1,
    keep=ok,
  )
  state = state.replace(
    step=state.step + 1,
    params=params,
    opt_state=keep(opt_state, state.opt_state),
    ema_params=keep(
      _update_ema(state, params, config.optimizer.ema_decay), state.ema_params
    ),
    tables=tables,
    table_states=table_states,
    num_skipped=state.num_skipped + jnp.where(ok, 0, 1),
  )
  one = jnp.float32(1.0)
  scalars = dict(terms) if len(terms) > 1 else {}
  scalars |= {
    "loss": (loss, one),
    "grad_norm": (grad_norm, one),
    "skipped": (jnp.where(ok, 0.0, 1.0), one),
  }
  return state, scalars


def loss_and_gradients(
  state: TrainState,
  batch: Batch,
  config: StepConfig,
  axis_name: str | None = None,
) -> tuple[dict[str, tuple[Array, Array]], dict[str, Any]]:
  """Loss terms and gradients of this device's examples.

  Returns:
    {name: (sum, weight)} of this device, and the gradients of the global mean
    with respect to `params` (this device's part) and, as `RowGradients` by
    table, of the rows read before and inside the model; beside them `writes`,
    what the model puts into its banks.
  """
  method, stage = config.method, config.stage
  rng = jax.random.fold_in(_key(state), state.step)
  if axis_name is not None:
    rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
  loss_fn = stage.loss_fn or method.module.loss_fn
  axis_sum = _axis_sum(axis_name)
  rows = method.read(state.tables, batch)
  banks = {n: rows.pop(n) for n in list(rows) if not method.tables[n].trained}

  def loss(variables):
    params = _stop_frozen(variables["params"], config)
    predictions, aux, reads = method.apply(
      params,
      state.tables,
      variables["rows"] | banks,
      batch,
      train=True,
      rng=rng,
      taps=variables["taps"],
    )
    terms = loss_fn(predictions, aux, batch, method.config)
    total = sum(
      term / jnp.maximum(axis_sum(weight), 1.0)
      for term, weight in terms.values()
    )
    return total, (terms, reads, aux.get("writes", {}))

  variables = {
    "params": state.params,
    "rows": rows,
    "taps": method.zero_taps(state.params, state.tables, batch),
  }
  gradient_fn = getattr(method.module, "gradient_fn", _gradient)
  (_, (terms, reads, writes)), grads = gradient_fn(loss, variables)
  ids = method.ids(batch)
  row_grads = {
    name: RowGradients(ids[name], grads["rows"][name]) for name in grads["rows"]
  }
  for name, read in reads.items():
    row_grads[name] = RowGradients(
      read["ids"], grads["taps"][name], read["weights"]
    )
  row_grads = {
    name: read for name, read in row_grads.items() if config.table_scale(name)
  }
  return terms, {
    "params": grads["params"],
    "row_grads": row_grads,
    "writes": writes,
  }


def _key(state: TrainState) -> Array:
  return jax.random.wrap_key_data(state.rng)


def _gradient(loss, variables):
  return jax.value_and_grad(loss, has_aux=True)(variables)


def _axis_sum(axis_name: str | None):
  if axis_name is None:
    return lambda tree: tree
  return lambda tree: jax.lax.psum(tree, axis_name)


def _gather(reads_or_writes, axis_name: str | None):
  """Those of all replicas, so that each makes the same update."""
  if axis_name is None:
    return reads_or_writes
  return jax.tree.map(
    lambda x: jax.lax.all_gather(x, axis_name, tiled=True), reads_or_writes
  )


def _stop_frozen(params, config: StepConfig):
  """Lets the compiler drop the backward pass of what is frozen."""

  def stop(path, value):
    scale = optimizer_lib.learning_rate_scale(
      config.optimizer, optimizer_lib.path_name(path), config.stage.trainable
    )
    return value if scale else jax.lax.stop_gradient(value)

  return jax.tree_util.tree_map_with_path(stop, params)


def _update_tables(
  state: TrainState, reads, ok: Bool[Array, ""], config: StepConfig
):
  rule = optimizer_lib.make_update_rule(config.optimizer)
  factor = optimizer_lib.factor(config.optimizer, config.num_steps)
  rate = config.optimizer.sparse.learning_rate * factor(
    state.step - config.first_step
  )
  tables, table_states = dict(state.tables), dict(state.table_states)
  for name, read in reads.items():
    tables[name], table_states[name] = apply_row_gradients(
      tables[name],
      table_states[name],
      read,
      table=config.method.tables[name],
      rule=rule,
      learning_rate=config.table_scale(name) * rate,
      step=state.step + 1,
      keep=ok,
    )
  return tables, table_states


def _update_ema(state: TrainState, params: Any, decay: float) -> Any:
  if not decay:
    return None
  step = state.step.astype(jnp.float32)
  # Early on a long memory would hold the initial values.
  decay: Float[Array, ""] = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(
    lambda average, new: decay * average + (1.0 - decay) * new,
    state.ema_params,
    params,
  )
