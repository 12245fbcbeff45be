"""Gradient-boosted trees on the features that the models of a recipe see.

Dense columns enter as they are, single ids as numbers (small vocabularies as
categories), vectors by their entries, and sequences and sets by their length
and, where events have times, the age of the last: trees have no embeddings.
Trained on the training part, stopped early on the
validation part, like the models. Every task has trees of its own; those of a
real label fit its symlog by least squares. Needs LightGBM, which the `dev`
extra brings.
"""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lightgbm
import numpy as np

from recjax import evaluate, losses, run_files
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
  """Trains on the tasks of a recipe and writes the files of a run.

  Args:
    config: As of any run, of which data, tasks, seed and label are used; a
      block `trees` replaces entries of `PARAMS`.
    workdir: Folder of the run.

  Returns:
    What `result.json` holds.

  Raises:
    UserError: For a mistake in config or data.
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
  tasks, seed = config["model"]["tasks"], config["seed"]
  columns = open_dataset(config["data"])
  for task in tasks:
    columns.schema.label(task)  # A mistake here, not after the training.
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
  parts = {split: _read(columns, split, tasks) for split in columns.num_rows}
  start = time.monotonic()
  boosters = {
    task: _fit(columns, parts, task, dict(params, seed=seed)) for task in tasks
  }
  secs = time.monotonic() - start
  return _write(workdir, boosters, parts, columns, secs, config)


def _fit(columns: Columns, parts, task: str, params: dict[str, Any]):
  names, categories = _columns(columns)
  params["metric"] = "auc"
  if _is_real(columns, task):
    params |= {"objective": "regression", "metric": "l2"}
  sets = {}
  for split in ("train", "valid"):
    label = parts[split]["labels"][task]
    seen = np.isfinite(label)
    label = label[seen]
    if _is_real(columns, task):
      label = np.asarray(losses.symlog(jnp.asarray(label)))
    sets[split] = lightgbm.Dataset(
      parts[split]["x"][seen],
      label,
      feature_name=names,
      categorical_feature=categories,
    )
  return lightgbm.train(
    params,
    sets["train"],
    num_boost_round=2000,
    valid_sets=[sets["valid"]],
    callbacks=[lightgbm.early_stopping(100, verbose=False)],
  )


def _write(workdir, boosters, parts, columns, secs, config):
  metrics = {}
  for split in ("valid", "test"):
    values, examples = _evaluate(boosters, parts[split], columns, split)
    metrics |= values
  np.savez_compressed(workdir / "predictions.npz", **examples)
  rounds = sum(b.current_iteration() for b in boosters.values())
  result = {
    "model": config.get("label") or "lightgbm",
    "dataset": config["data"]["name"],
    "seed": config["seed"],
    "steps": rounds,
    "best_step": sum(b.best_iteration for b in boosters.values()),
    "metrics": metrics,
    "params": {"dense": None, "sparse": None, "active": None},
    "flops_per_example": None,
    "examples_per_sec": rounds * columns.num_rows["train"] / secs,
  }
  write_json(workdir / "result.json", result)
  return result


def _evaluate(boosters, part, columns: Columns, split: str):
  """Metrics of all tasks by their names, and scores, labels and groups."""
  metrics, examples, cells = {}, {}, {}
  groups, real = part["groups"], set()
  for task, booster in boosters.items():
    label = part["labels"][task]
    seen = np.isfinite(label)
    known = np.where(seen, label, 0.0).astype(np.float64)
    scores = booster.predict(part["x"], raw_score=True)
    if _is_real(columns, task):
      real.add(task)
      scores = np.asarray(losses.symexp(jnp.asarray(scores)), np.float64)
      values = summary.summarize_real(scores, known, mask=seen)
    else:
      values = summary.summarize(scores, known, mask=seen, groups=groups)
      for popularity in part["popularity"].values():
        values |= slices.summarize_by_slice(
          scores, known, evaluate.item_slices(popularity), mask=seen
        )
    metrics |= {f"{split}/{task}/{k}": v for k, v in values.items()}
    if columns.schema.roles.scenario is not None:
      cells[task] = slices.summarize_by_scenario(
        scores,
        known,
        part["scenario"],
        mask=seen,
        groups=groups,
        is_real=task in real,
      )
    examples |= {f"{task}/score": scores, f"{task}/label": label}
  metrics |= evaluate.scenario_means(cells, frozenset(real), split)
  return metrics, examples | {k: v for k, v in groups.items() if k == "group"}


def _is_real(columns: Columns, task: str) -> bool:
  return columns.schema.label(task).kind == "real"


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


def _read(columns: Columns, split: str, tasks: Sequence[str]) -> dict:
  """Features, labels (NaN where not known), groups and scenarios of a split."""
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
    labels = {
      task: np.where(batch.label_mask[task], batch.labels[task], np.nan)
      for task in tasks
    }
    blocks.append(
      {
        "x": np.concatenate([batch.dense, x, *vectors], axis=1),
        "labels": labels,
        "groups": dict(batch.groups),
        "scenario": batch.scenario,
        "popularity": {
          k: v for k, v in batch.ids.items() if k == schema.roles.popularity
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
