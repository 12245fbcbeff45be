"""The control of `planted_lemur.py`: texts that say nothing of the label.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_lemur_control.py \\
        --workdir=runs/planted_lemur_control --num_processes=2 \\
        --results=experiments/results/planted_lemur_control
"""

from experiments.sweeps import planted_lemur
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The control."""
  return planted_lemur.get_sweep(is_control=True)
