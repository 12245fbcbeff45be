"""A method file bound to its config and a schema.

What a file under `recjax/models/` or `recjax/baselines/` holds:

* `Config`: a frozen dataclass.
* `Model(config, schema)`: a Linen module; `model(batch, rows, *, train) ->
  (predictions, aux)`. `rows[table][feature]` are the embedding rows of the
  batch; `predictions[task]` is a logit (or the `symlog` of a real label).
  A method whose `Config` has no `tasks` learns from a randomised trial
  (`schema.trial`) and predicts the `response` and the `cost` of every
  treatment, `[batch, treatments]` each, in the units of the data.
* `tables(config, schema) -> {name: Table}`: the row-sparse tables. Those that
  are not trained are banks: the model reads their rows as constants, and puts
  `{name: Writes}` into `aux["writes"]`, which a training step then writes.
* `loss_fn(predictions, aux, batch, config) -> {name: (sum, weight)}`: the
  loss is the sum over names of sum / weight.
* Optional `STAGES`, a tuple of `recjax.stage.Stage`: training in several
  parts. Where the config decides on them, a function `stages(config)`.
* Optional `gradient_fn(loss, variables)`: shapes its own gradient; gets
  `loss(variables) -> (value, extras)` and returns what
  `jax.value_and_grad(loss, has_aux=True)(variables)` would.
* Optional `diagnostics(counters) -> {name: number}`: sums that the model puts
  in `aux["counters"]`, added over an evaluation, turned into numbers to log.
* Optional `idle_params(config) -> int`: dense parameters that an example does
  not use, such as those of experts that it is not sent to.
* Optional methods of `Model`, `encode_user(batch, rows) -> encoded` and
  `decode(encoded, batch, rows, *, train)`, which `__call__` does one after the
  other: what does not depend on the candidate, and the rest; see `serve`.
  `encoded_features` names the sequences that the first reads, if not all.
* Optional `PER_SCENARIO`, a tuple of regular expressions on parameter paths:
  weights with a leading axis of scenarios, of which an example uses one.
* Optional `fold(params, config) -> (params, config)`: what is served in their
  place, with the same predictions.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
import types
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

import recjax.baselines
import recjax.models
from recjax import config as config_lib
from recjax.batch import Batch, TrialRows
from recjax.errors import UserError
from recjax.schema import Schema, suggest
from recjax.sparse import in_model
from recjax.sparse import table as table_lib
from recjax.sparse.table import Table
from recjax.stage import Stage

PACKAGES = (recjax.models, recjax.baselines)


@dataclasses.dataclass(frozen=True)
class Method:
  """Everything that training, evaluation and export need of a method."""

  name: str
  module: types.ModuleType | types.SimpleNamespace
  config: Any
  schema: Schema

  @functools.cached_property
  def model(self) -> nn.Module:
    """The Linen module."""
    return self.module.Model(self.config, self.schema)

  @functools.cached_property
  def tables(self) -> dict[str, Table]:
    """Declared row-sparse tables."""
    return self.module.tables(self.config, self.schema)

  @property
  def tasks(self) -> tuple[str, ...]:
    """Labels that it predicts; none for a method of a trial."""
    return getattr(self.config, "tasks", ())

  @property
  def is_trial(self) -> bool:
    """Whether it learns from a randomised trial, and not from labels."""
    return not hasattr(self.config, "tasks")

  @property
  def stages(self) -> tuple[Stage, ...]:
    """The parts of its training; one unless the file says otherwise."""
    if hasattr(self.module, "stages"):
      return self.module.stages(self.config)
    return getattr(self.module, "STAGES", (Stage(),))

  def init(self, rng: Array) -> tuple[Any, dict[str, Array]]:
    """Initial parameters and tables; free of data, jit it."""
    params_rng, tables_rng = jax.random.split(rng)
    table_values = {
      name: table_lib.init_table(jax.random.fold_in(tables_rng, i), table)
      for i, (name, table) in enumerate(sorted(self.tables.items()))
    }
    batch = empty_batch(self.schema, self.tasks)
    variables = {in_model.TABLES: self._in_model(table_values)}
    _, mutated = self.model.apply(
      variables,
      batch,
      self._split(self.read(table_values, batch), batch),
      train=False,
      rngs={"params": params_rng},
      mutable=["params", in_model.READS],
    )
    reads = in_model.flatten_reads(mutated.get(in_model.READS, {}))
    in_model.check_reads(reads, self.tables)
    return mutated["params"], table_values

  def read(
    self, table_values: Mapping[str, Array], batch: Batch
  ) -> dict[str, Array]:
    """One concatenated gather per table: the rows that `batch` names."""
    return {
      name: table_lib.gather(table_values[name], ids, self.tables[name])
      for name, ids in self.ids(batch).items()
    }

  def read_features(
    self,
    table_values: Mapping[str, Array],
    batch: Batch,
    only: Collection[str] | None = None,
  ) -> dict[str, dict[str, Array]]:
    """Table -> feature -> rows, as the model takes them; for serving.

    Args:
      table_values: All tables as stored.
      batch: The examples.
      only: Features to read; `batch` need not hold the others. None: all.
    """
    rows = {}
    for name, table in self.tables.items():
      first_row = {
        feature: row
        for feature, row in table.first_row.items()
        if only is None or feature in only
      }
      if first_row:
        part = dataclasses.replace(table, first_row=first_row)
        ids = table_lib.feature_ids(part, batch)
        flat = table_lib.gather(table_values[name], ids, part)
        rows[name] = table_lib.split_rows(flat, part, batch)
    return rows

  def call(
    self, params: Any, table_values: Mapping[str, Array], *args, **kwargs
  ) -> Any:
    """Calls the model, or its `method=NAME`, on split rows; for serving."""
    variables = {
      "params": params,
      in_model.TABLES: self._in_model(table_values),
    }
    output, _ = self.model.apply(
      variables, *args, mutable=[in_model.READS], **kwargs
    )
    return output

  def ids(self, batch: Batch) -> dict[str, Array]:
    """The row numbers of `read`, flat."""
    return {
      name: table_lib.feature_ids(table, batch)
      for name, table in self.tables.items()
      if not table.in_model
    }

  def apply(
    self,
    params: Any,
    table_values: Mapping[str, Array],
    rows: Mapping[str, Array],
    batch: Batch,
    *,
    train: bool,
    rng: Array | None = None,
    taps: Mapping[str, Array] | None = None,
    perturbations: Any = None,
  ) -> tuple[dict[str, Array], dict[str, Any], dict[str, Any]]:
    """Runs the model.

    Args:
      params: Linen parameters.
      table_values: All tables as stored.
      rows: Result of `read`.
      batch: The examples.
      train: Whether dropout and the like are on.
      rng: Randomness of a training step.
      taps: Zeros at the in-model reads, to take gradients at.
      perturbations: Zeros at what tasks share, likewise; see
        `recjax.task_gradients`.

    Returns:
      Predictions, aux, and the in-model reads {table: {"ids", "weights"}}.
    """
    variables = {
      "params": params,
      in_model.TABLES: self._in_model(table_values),
    }
    if taps:
      variables[in_model.TAPS] = in_model.collection(taps)
    if perturbations is not None:
      variables["perturbations"] = perturbations
    (predictions, aux), mutated = self.model.apply(
      variables,
      batch,
      self._split(rows, batch),
      train=train,
      rngs=None if rng is None else {"dropout": rng},
      mutable=[in_model.READS],
    )
    reads = in_model.flatten_reads(mutated.get(in_model.READS, {}))
    return predictions, aux, reads

  def perturbation_shapes(
    self, params: Any, table_values: Mapping[str, Array], batch: Batch
  ) -> Any:
    """Shapes of what the tasks share, a copy a task; empty if nothing is."""

    def run(params, table_values, batch):
      variables = {
        "params": params,
        in_model.TABLES: self._in_model(table_values),
      }
      return self.model.apply(
        variables,
        batch,
        self._split(self.read(table_values, batch), batch),
        train=False,
        mutable=["perturbations", in_model.READS],
      )[1].get("perturbations", {})

    return jax.eval_shape(run, params, table_values, batch)

  def zero_taps(
    self, params: Any, table_values: Mapping[str, Array], batch: Batch
  ) -> dict[str, Array]:
    """Zeros in the shapes of the in-model reads of a training step."""
    if not any(table.in_model for table in self.tables.values()):
      return {}

    def reads_of(params, table_values, batch):
      rows = self.read(table_values, batch)
      rng = jax.random.key(0)
      # A model may read more in training than when it serves.
      return self.apply(params, table_values, rows, batch, train=True, rng=rng)[
        2
      ]

    reads = jax.eval_shape(reads_of, params, table_values, batch)
    in_model.check_reads(reads, self.tables)
    return in_model.zero_taps(reads, self.tables)

  def _in_model(self, table_values: Mapping[str, Array]) -> dict[str, Any]:
    return in_model.collection(
      {
        name: values
        for name, values in table_values.items()
        if self.tables[name].in_model
      }
    )

  def _split(
    self, rows: Mapping[str, Array], batch: Batch
  ) -> dict[str, dict[str, Array]]:
    return {
      name: table_lib.split_rows(flat, self.tables[name], batch)
      for name, flat in rows.items()
    }


def load(name: str, config: Mapping[str, Any], schema: Schema) -> Method:
  """Imports the method file `name` and builds its checked config.

  Raises:
    UserError: If there is no such file, a key is unknown, or a task is no
      label of the data.
  """
  module, built = load_config(name, config)
  method = Method(name=name, module=module, config=built, schema=schema)
  if method.is_trial:
    _check_trial(name, schema)
    return method
  for task in method.tasks:
    schema.label(task)
  if not schema.id_features:
    raise UserError(
      f"model {name!r} needs an id: the data has no sparse or sequence "
      "feature; add one to its schema"
    )
  return method


def _check_trial(name: str, schema: Schema) -> None:
  if schema.trial is None:
    raise UserError(
      f"model {name!r} needs a randomised trial: the data has no treatments; "
      'give its schema a "trial" block'
    )


def load_config(
  name: str, config: Mapping[str, Any]
) -> tuple[types.ModuleType | types.SimpleNamespace, Any]:
  """The method file `name` and its checked config; needs no data."""
  module = find_module(name)
  return module, config_lib.build(module.Config, config, "config.model")


def find_module(name: str) -> types.ModuleType:
  """The module of a method, by its file name."""
  for package in PACKAGES:
    full_name = f"{package.__name__}.{name}"
    if name.isidentifier() and importlib.util.find_spec(full_name):
      return importlib.import_module(full_name)
  raise UserError(
    f"unknown model {name!r} in config.model_name" + suggest(name, names())
  )


def names() -> list[str]:
  """All methods and baselines."""
  return [
    module.name
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__)
  ]


def empty_batch(schema: Schema, tasks: tuple[str, ...], size: int = 1) -> Batch:
  """A batch of zeros in the shapes of `schema`, all examples masked."""
  ids, id_mask = {}, {}
  for feature in schema.id_features:
    shape = (size, feature.max_len) if feature.is_list else (size,)
    ids[feature.name] = jnp.zeros(shape, jnp.int32)
    if feature.is_list:
      id_mask[feature.name] = jnp.zeros(shape, bool)
  false = jnp.zeros((size,), bool)
  return Batch(
    dense=jnp.zeros((size, len(schema.dense_features))),
    ids=ids,
    id_mask=id_mask,
    vectors={f.name: jnp.zeros((size, f.dim)) for f in schema.vector_features},
    labels={task: jnp.zeros((size,)) for task in tasks},
    label_mask={task: false for task in tasks},
    scenario=jnp.zeros((size,), jnp.int32),
    groups={},
    example_mask=false,
    event_age={
      f.name: jnp.zeros((size, f.max_len)) for f in schema.sequences if f.time
    },
    trial=None if schema.trial is None else _empty_trial(size),
    tokens={
      f.name: jnp.zeros((size, f.max_len), jnp.int32)
      for f in schema.text_features
    },
    token_mask={
      f.name: jnp.zeros((size, f.max_len), bool) for f in schema.text_features
    },
    real_labels=frozenset(
      label.name for label in schema.labels if label.kind == "real"
    ),
  )


def _empty_trial(size: int) -> TrialRows:
  numbers, counts = jnp.zeros((size,)), jnp.zeros((size,), jnp.int32)
  return TrialRows(
    treatment=counts,
    response=numbers,
    cost=numbers,
    propensity=numbers,
    cluster=counts,
  )
