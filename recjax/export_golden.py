"""The raw rows of an export, and the model's own scores of them."""

import importlib
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from recjax import restore
from recjax import scorer as scorer_lib
from recjax.batch import Batch
from recjax.config import build
from recjax.data.vocabulary import load_values
from recjax.errors import UserError

NUM_GOLDEN = 64
# Of a prediction, relative where that is above 1; by the type of computation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
# Two ways to compute a search may break a tie of its last slots differently.
AGREEING = 0.9


def golden_rows(run: restore.Run) -> dict[str, Any]:
  """Raw rows of the test part and the model's predictions of them."""
  num_rows = min(NUM_GOLDEN, run.columns.num_rows["test"])
  batch = run.columns.read("test", np.arange(num_rows))
  method, state = run.method, run.state

  @jax.jit
  def predict(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[0]

  predictions = jax.device_get(predict(state.eval_params, state.tables, batch))
  _check_data(run, predictions)
  return {
    "columns": _raw_rows(run, batch),
    "predictions": predictions,
    "tolerance": TOLERANCE[getattr(method.config, "dtype", "float32")],
  }


def _check_data(run: restore.Run, predictions: Mapping[str, np.ndarray]):
  """Raises if the data is not what the run was trained and tested on."""
  with np.load(run.workdir / "predictions.npz") as stored:
    for task, values in predictions.items():
      if run.method.schema.label(task).kind == "real":
        values = np.sign(values) * np.expm1(np.abs(values))
      before = stored[f"{task}/score"]
      same = len(before) == run.columns.num_rows["test"] and np.isclose(
        before[: len(values)], values, rtol=1e-2, atol=1e-2
      )
      if np.mean(same) < AGREEING:
        raise UserError(
          f"{run.workdir}: its predictions.npz holds other scores of "
          f"{task!r} than the model gives now, so the data has changed since; "
          "restore it, or train the run again in another --workdir"
        )


def _raw_rows(run: restore.Run, batch: Batch) -> dict[str, list]:
  """The rows of `batch` as the source has them.

  An adapter that can tell offers `read_raw`. For others the values are looked
  up in the vocabularies; one that is in none becomes another such. Times of
  events are counted from their row's own, which is 0.
  """
  data = dict(run.config["data"])
  adapter = importlib.import_module(f"recjax.data.{data.pop('name')}")
  if hasattr(adapter, "read_raw"):
    data.pop("cache_dir", None)
    options = build(adapter.Config, data, "config.data")
    return adapter.read_raw(options, "test", batch.size)
  schema, raw = run.columns.schema, {}
  if schema.text_features:
    # The tokens of a text that was cut do not tell it.
    raise UserError(
      f"{adapter.__name__} cannot tell its raw texts, so an export could not "
      "be checked; give the adapter read_raw(options, split, num_rows)"
    )
  dense = run.columns.raw_dense("test")[: batch.size]
  for position, feature in enumerate(schema.dense_features):
    raw[feature.name] = dense[:, position].tolist()
  for feature in schema.vector_features:
    raw[feature.name] = batch.vectors[feature.name].tolist()
  for feature in schema.id_features:
    values = load_values(run.columns.directory, feature.vocab).to_pylist()
    values = np.array([_unknown(values), *values], object)
    ids = batch.ids[feature.name]
    if feature.is_list:
      masks = batch.id_mask[feature.name]
      raw[feature.name] = [
        values[row[mask]].tolist() for row, mask in zip(ids, masks, strict=True)
      ]
    else:
      raw[feature.name] = values[ids].tolist()
  for feature in schema.sequences:
    if feature.time is not None:
      ages, masks = batch.event_age[feature.name], batch.id_mask[feature.name]
      raw[schema.roles.time] = [0.0] * batch.size
      raw[feature.time] = [
        (-row[mask]).tolist() for row, mask in zip(ages, masks, strict=True)
      ]
  return raw


def _unknown(values: list[Any]) -> int | str:
  """A value that is none of these, of their type."""
  is_text = any(isinstance(value, str) for value in values)
  candidates = (f"?{i}" if is_text else i for i in itertools.count())
  known = set(values)
  return next(value for value in candidates if value not in known)


def agreeing(
  golden: dict[str, Any], scorer: scorer_lib.Scorer, least: float
) -> dict[str, Any]:
  """The golden rows that the export scores as the model does.

  Raises:
    RuntimeError: If that is less than the share `least`.
  """
  difference = scorer.differences(golden)
  kept = difference <= golden["tolerance"]
  tell = logging.info if kept.all() else logging.warning
  tell(
    "%d of %d golden rows are within %g of the model.",
    kept.sum(),
    len(kept),
    golden["tolerance"],
  )
  if kept.mean() < least:
    raise RuntimeError(
      f"the export differs from the model by up to {difference.max():.1e}"
    )

  def choose(columns):
    return {
      name: [v for v, keep in zip(values, kept, strict=True) if keep]
      for name, values in columns.items()
    }

  return golden | {
    "columns": choose(golden["columns"]),
    "predictions": choose(golden["predictions"]),
  }
