"""The control of `planted_hyformer.py`: the same without anything to find.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_hyformer_control.py \\
        --workdir=runs/planted_hyformer_control --num_processes=2 \\
        --results=experiments/results/planted_hyformer_control
"""

from experiments.sweeps import planted_hyformer
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The control."""
  return planted_hyformer.get_sweep(is_control=True)
