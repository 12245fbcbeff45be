"""What more slots give: 64 ** 2 to 1024 ** 2 on the bundled KuaiRand log.

    python -m experiments.sweep --sweep=experiments/sweeps/msn_slots.py \\
        --workdir=runs/msn_slots --num_processes=2 \\
        --results=experiments/results/msn_slots

What they cost is measured by `python -m experiments.bench_memory`. Nothing
tuned.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

NUM_KEYS = (64, 128, 256, 512, 1024)


def get_sweep() -> Sweep:
  """One row a size, one layer with a memory."""
  return Sweep(
    models=tuple(
      common.model(
        f"slots_{num_keys}x{num_keys}",
        "msn:base",
        {"model.memory_layers": (0,), "model.memory.num_keys": num_keys},
      )
      for num_keys in NUM_KEYS
    ),
    baseline="slots_64x64",
    table_metrics=("test/click/auc", "test/memory_0/perplexity"),
  )
