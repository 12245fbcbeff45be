"""What the tests of sweeps share: trainers that only pretend to train.

None imports JAX, so that a worker starts in a moment.
"""

import json
import os
import pathlib
import time

import numpy as np

from recjax.errors import DivergedError, UserError

USERS = np.repeat(np.arange(60), 5)
LABELS = np.random.default_rng(0).integers(0, 2, USERS.size)


def train(config, workdir):
  """Scores by `model.gain` and the seed, or ends as `model.end` says."""
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  note = workdir.parents[1] / "started"
  with note.open("a") as file:
    file.write(f"{workdir.name} {sorted(os.sched_getaffinity(0))}\n")
  time.sleep(config["model"].get("secs", 0))
  print("what a run prints")
  end = config["model"].get("end", "done")
  if end == "programs":
    import jax  # Seconds, which only this run is worth.

    print(jax.config.jax_compilation_cache_dir)
  if end == "mistake":
    raise UserError("table.csv has no column 'x'")
  if end == "diverged":
    raise DivergedError("the loss is not finite at step 7; lower")
  if end == "bug":
    raise KeyError("a bug")
  if end == "full":
    raise OSError(28, "No space left on device", "/disk/file")
  if end == "killed":
    os.kill(os.getpid(), 9)
  if end == "stopped":
    return None
  return write(config, workdir, end)


def write(config, workdir, end="done"):
  """The files of a run whose better scores come from a larger `model.gain`."""
  from recjax.metrics import summary
  from recjax.writer import write_json

  rng = np.random.default_rng([config["seed"], len(config["label"])])
  gain = config["model"]["gain"]
  logits = gain * (LABELS - 0.5) + rng.normal(size=LABELS.size)
  values = summary.summarize(logits, LABELS, groups={"group": USERS})
  metrics = {f"test/click/{k}": v for k, v in values.items()}
  metrics["valid/click/auc"] = "nan" if end == "nan" else gain / 10
  result = {
    "model": config["label"],
    "dataset": "toy",
    "seed": config["seed"],
    "steps": config.get("train", {}).get("num_epochs", 3),
    "metrics": metrics,
    "params": {"dense": 1, "sparse": 2, "active": 3},
    "flops_per_example": 4,
    "examples_per_sec": time.monotonic(),
  }
  np.savez(
    workdir / "predictions.npz",
    **{"click/score": logits, "click/label": LABELS, "group": USERS},
  )
  write_json(workdir / "config.json", {**config, "commit": "abc"})
  write_json(workdir / "result.json", result)
  return json.loads((workdir / "result.json").read_text())
