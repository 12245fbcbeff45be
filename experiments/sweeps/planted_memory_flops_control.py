"""The control of `planted_memory_flops.py`: the same without planted rules.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_memory_flops_control.py \\
        --workdir=runs/planted_memory_flops_control --num_processes=2 \\
        --results=experiments/results/planted_memory_flops_control
"""

from experiments.sweeps import planted_memory_flops
from recjax.sweep import Sweep


def get_sweep() -> Sweep:
  """The control."""
  return planted_memory_flops.get_sweep(is_control=True)
