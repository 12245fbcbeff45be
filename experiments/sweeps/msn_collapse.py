"""What keeps the slots of MSN in use: LayerNorm x Theta x warm-up.

    python -m experiments.sweep --sweep=experiments/sweeps/msn_collapse.py \\
        --workdir=runs/msn_collapse --num_processes=2 \\
        --results=experiments/results/msn_collapse

All 2 x 2 x 2 combinations of the three devices of MSN (arXiv 2602.07526), which
the paper does not take apart, on the bundled KuaiRand log, with a memory in
each of two layers. A row is named by the devices that it has. 40 runs, nothing
tuned.
"""

import itertools

from experiments.sweeps import common
from recjax.sweep import Sweep

# The word of each device, and its value without the device.
DEVICES = {
  "norm": ("model.memory.use_layer_norm", False),
  "theta": ("model.memory.use_over_parameterization", False),
  "warmup": ("optimizer.warmup_steps", 0),
}


def get_sweep() -> Sweep:
  """All combinations; the baseline has all devices."""
  models = []
  for present in itertools.product((True, False), repeat=len(DEVICES)):
    names = [n for n, here in zip(DEVICES, present, strict=True) if here]
    words = {"model.memory_layers": (0, 1)}
    words |= dict(DEVICES[n] for n in DEVICES if n not in names)
    label = "_".join(names) or "none"
    models.append(common.model(label, "msn:base", words))
  return Sweep(
    models=tuple(models),
    baseline="norm_theta_warmup",
    table_metrics=(
      "test/memory_0/perplexity",
      "test/memory_1/perplexity",
      "test/click/auc",
    ),
  )
