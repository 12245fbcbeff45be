"""The runs of `planted_memory.py` once more, each model compared with MSN.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_memory_rivals.py \\
        --workdir=runs/planted_memory --num_processes=2 \\
        --results=experiments/results/planted_memory_rivals

In the folder of that sweep nothing is run again.
"""

import dataclasses

from experiments.sweeps import planted_memory
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The same models, MSN as the baseline."""
  return dataclasses.replace(
    planted_memory.get_sweep(), baseline="msn", control=None
  )
