"""The control of `planted_memory.py`: the same without the planted rules.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_memory_control.py \\
        --workdir=runs/planted_memory_control --num_processes=2 \\
        --results=experiments/results/planted_memory_control
"""

from experiments.sweeps import planted_memory
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The control."""
  return planted_memory.get_sweep(is_control=True)
