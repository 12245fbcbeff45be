"""The planted trial that linear models fit: the gain must be gone.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_trial_control.py \\
        --workdir=runs/planted_trial_control --num_processes=2 \\
        --results=experiments/results/planted_trial_control
"""

from experiments.sweeps import planted_trial
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The well-specified world."""
  return planted_trial.get_sweep("well_specified")
