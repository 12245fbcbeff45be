"""The rows of MSN's ablation table, at the size of the bundled KuaiRand log.

    python -m experiments.sweep --sweep=experiments/sweeps/msn_ablation.py \\
        --workdir=runs/msn_ablation --num_processes=2 \\
        --results=experiments/results/msn_ablation

The reference is, as in the paper (arXiv 2602.07526), one layer with a memory of
top_k slots; sizes are in proportion: 64 ** 2 slots for the paper's 256 ** 2 and
16 reads for its 32. The paper's change of QAUC against its reference, in %:
2 layers +0.05, 4 layers -0.05 (here of four blocks: compare with `blocks_4`),
four times the slots +0.04, values per token +0.06, twice the reads 0.00, half
-0.01, a quarter -0.05, no tanh -0.02, sigmoid -0.05. Nothing tuned.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

ROWS = {
  "reference": {},
  "layers_2": {"model.memory_layers": (0, 1)},
  "blocks_4": {"model.num_layers": 4},
  "blocks_4_layers_4": {
    "model.num_layers": 4,
    "model.memory_layers": (0, 1, 2, 3),
  },
  "slots_x4": {"model.memory.num_keys": 128},
  "values_per_token": {"model.memory.value_scope": "per_token"},
  "top_k_x2": {"model.memory.top_k": 32},
  "top_k_half": {"model.memory.top_k": 8},
  "top_k_quarter": {"model.memory.top_k": 4},
  "no_tanh": {"model.gate": "none"},
  "sigmoid": {"model.gate": "sigmoid"},
  "one_plus_tanh": {"model.gate": "one_plus_tanh"},
}


def get_sweep() -> Sweep:
  """One row a change."""
  return Sweep(
    models=tuple(
      common.model(label, "msn:base", {"model.memory_layers": (0,)} | words)
      for label, words in ROWS.items()
    ),
    baseline="reference",
    table_metrics=(
      "test/click/auc",
      "test/click/gauc",
      "test/memory_0/perplexity",
    ),
  )
