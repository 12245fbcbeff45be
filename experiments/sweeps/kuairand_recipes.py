"""The recipes that the demo shows, as they are, on the bundled KuaiRand log.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/kuairand_recipes.py \\
        --workdir=runs/kuairand_recipes --num_processes=2 \\
        --results=experiments/results/kuairand_recipes

Five seeds, nothing tuned; `kuairand_base.py` tunes all models alike. 20 runs,
about a minute each.
"""

import dataclasses

from experiments.sweeps import kuairand_base
from recjax.sweep import Sweep

ROWS = ("dlrm_mlp", "rankmixer", "msn", "lightgbm")


def get_sweep() -> Sweep:
  """README's first results."""
  tuned = kuairand_base.get_sweep()
  return dataclasses.replace(
    tuned,
    models=tuple(
      dataclasses.replace(model, space={})
      for model in tuned.models
      if model.label in ROWS
    ),
    num_trials=0,
  )
