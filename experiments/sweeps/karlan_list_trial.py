"""All trial methods on Karlan and List's matching grants, as `hillstrom_trial`.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/karlan_list_trial.py \\
        --workdir=runs/karlan_list_trial --num_processes=2 \\
        --results=experiments/results/karlan_list_trial
"""

from experiments.sweeps import hillstrom_trial
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The second data set, with the settings of the first."""
  return hillstrom_trial.get_sweep("karlan_list")
