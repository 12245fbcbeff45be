"""Gradient-boosted trees on the features that the models of a recipe see.

Dense columns enter as they are, single ids as numbers (small vocabularies as
categories), vectors by their entries, and sequences and sets by their length
and, where events have times, the age of the last: trees have no embeddings.
Trained on the training part, stopped early on the
validation part, like the models. Needs LightGBM, which the `dev` extra brings.
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import lightgbm
import numpy as np

from recjax import evaluate, run_files
from recjax.batch import Batch
from recjax.data.columns import Columns
from recjax.data.pipeline import open_dataset
from recjax.errors import UserError
from recjax.metrics import slices, summary
from recjax.schema import suggest
from recjax.writer import write_json

MAX_CATEGORIES = 64
PARAMS = dict(
  objective="binary",
  learning_rate=0.05,
  num_leaves=63,
  min_data_in_leaf=200,
  feature_fraction=0.5,
  bagging_fraction=0.8,
  bagging_freq=1,
  lambda_l2=10.0,
  cat_smooth=50.0,
  max_bin=255,
  num_threads=1,  # Sums depend on their number, and runs share a machine.
  verbosity=-1,
)


def train_and_evaluate(
  config: Mapping[str, Any], workdir: str
) -> dict[str, Any]:
  """Trains on the first task of a recipe and writes the files of a run.

  Args:
    config: As of any run, of which data, first task, seed and label are used;
      a block `trees` replaces entries of `PARAMS`.
    workdir: Folder of the run.

  Returns:
    What `result.json` holds.

  Raises:
    UserError: For a mistake in config or data, or a label that is not binary.
  """
  config = dict(config)
  params = {**PARAMS, **config.pop("trees", {})}
  for name in params:
    if name not in PARAMS:
      raise UserError(
        f"unknown key config.trees.{name}" + suggest(name, PARAMS)
      )
  config = run_files.check_blocks(config)
  workdir = pathlib.Path(workdir)
  task, seed = config["model"]["tasks"][0], config["seed"]
  columns = open_dataset(config["data"])
  if columns.schema.label(task).kind != "binary":
    raise UserError(f"label {task!r} is not binary; trees here classify only")
  run_files.claim_workdir(
    workdir,
    {
      "model_name": "lightgbm",
      "data": config["data"],
      "params": params,
      "seed": seed,
    },
    None,
  )
  if (result := run_files.read_result(workdir)) is not None:
    return result
  parts = {split: _matrix(columns, split, task) for split in columns.num_rows}
  start = time.monotonic()
  booster = _fit(columns, parts, dict(params, seed=seed, metric="auc"))
  secs = time.monotonic() - start
  return _write(workdir, booster, parts, columns, task, secs, config)


def _fit(columns: Columns, parts, params: Mapping[str, Any]):
  names, categories = _columns(columns)
  sets = {
    split: lightgbm.Dataset(
      parts[split]["x"],
      parts[split]["y"],
      feature_name=names,
      categorical_feature=categories,
    )
    for split in ("train", "valid")
  }
  return lightgbm.train(
    dict(params),
    sets["train"],
    num_boost_round=2000,
    valid_sets=[sets["valid"]],
    callbacks=[lightgbm.early_stopping(100, verbose=False)],
  )


def _write(workdir, booster, parts, columns, task, secs, config):
  metrics = {}
  for split in ("valid", "test"):
    part = parts[split]
    logits = booster.predict(part["x"], raw_score=True)
    values = summary.summarize(
      logits, part["y"].astype(np.float64), groups=part["groups"]
    )
    for popularity in part["popularity"].values():
      values |= slices.summarize_by_slice(
        logits, part["y"], evaluate.item_slices(popularity)
      )
    metrics |= {f"{split}/{task}/{k}": v for k, v in values.items()}
  np.savez_compressed(
    workdir / "predictions.npz",
    **{f"{task}/score": logits, f"{task}/label": part["y"]},
    **{k: v for k, v in part["groups"].items() if k == "group"},
  )
  rounds = booster.current_iteration()
  result = {
    "model": config.get("label") or "lightgbm",
    "dataset": config["data"]["name"],
    "seed": config["seed"],
    "steps": rounds,
    "best_step": booster.best_iteration,
    "metrics": metrics,
    "params": {"dense": None, "sparse": None, "active": None},
    "flops_per_example": None,
    "examples_per_sec": rounds * columns.num_rows["train"] / secs,
  }
  write_json(workdir / "result.json", result)
  return result


def _columns(columns: Columns) -> tuple[list[str], list[str]]:
  """Names of the matrix's columns, and which are categories."""
  schema = columns.schema
  single = [f for f in schema.id_features if not f.is_list]
  names = [f.name for f in schema.dense_features] + [f.name for f in single]
  names += [f"{f.name}_length" for f in schema.features if f.is_list]
  names += [f"{f.name}_last_age" for f in schema.sequences if f.time]
  for feature in schema.vector_features:
    names += [f"{feature.name}_{i}" for i in range(feature.dim)]
  categories = [
    f.name
    for f in single
    # Row 0 is for what is missing.
    if schema.vocab_sizes[f.vocab] <= 1 + MAX_CATEGORIES
  ]
  return names, categories


def _matrix(columns: Columns, split: str, task: str) -> dict:
  """Features, labels and groups of a split; rows without the label left out."""
  schema, blocks = columns.schema, []
  for rows in np.array_split(
    np.arange(columns.num_rows[split]), columns.num_rows[split] // 65536 + 1
  ):
    batch = columns.read(split, rows)
    single = [batch.ids[f.name] for f in schema.id_features if not f.is_list]
    lengths = [
      batch.id_mask[f.name].sum(axis=1) for f in schema.features if f.is_list
    ]
    ages = [_last_age(batch, f.name) for f in schema.sequences if f.time]
    x = np.stack([*single, *lengths, *ages], axis=1).astype(np.float32)
    vectors = [batch.vectors[f.name] for f in schema.vector_features]
    seen = batch.label_mask[task]
    blocks.append(
      {
        "x": np.concatenate([batch.dense, x, *vectors], axis=1)[seen],
        "y": batch.labels[task][seen],
        "groups": {k: v[seen] for k, v in batch.groups.items()},
        "popularity": {
          k: v[seen]
          for k, v in batch.ids.items()
          if k == schema.roles.popularity
        },
      }
    )
  return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)


def _last_age(batch: Batch, sequence: str) -> np.ndarray:
  """Seconds since the last event, NaN where there is none."""
  last = batch.id_mask[sequence].sum(axis=1) - 1
  age = np.take_along_axis(
    batch.event_age[sequence], np.maximum(last, 0)[:, None], axis=1
  )[:, 0]
  return np.where(last >= 0, age, np.nan)
