"""The control of `planted_mdl.py`: scenarios and tasks that are all alike.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_mdl_control.py \\
        --workdir=runs/planted_mdl_control --num_processes=2 \\
        --results=experiments/results/planted_mdl_control
"""

from experiments.sweeps import planted_mdl
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The control."""
  return planted_mdl.get_sweep(is_control=True)
