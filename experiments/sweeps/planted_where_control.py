"""The control of `planted_where.py`: the same without the planted steps.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_where_control.py \\
        --workdir=runs/planted_where_control --num_processes=2 \\
        --results=experiments/results/planted_where_control
"""

from experiments.sweeps import planted_where
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The control."""
  return planted_where.get_sweep(is_control=True)
