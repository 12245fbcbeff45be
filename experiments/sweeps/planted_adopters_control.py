"""The control of `planted_adopters.py`: lists that say nothing.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_adopters_control.py \\
        --workdir=runs/planted_adopters_control --num_processes=2 \\
        --results=experiments/results/planted_adopters_control
"""

from experiments.sweeps import planted_adopters
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The control."""
  return planted_adopters.get_sweep(is_control=True)
