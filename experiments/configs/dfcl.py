"""DFCL (arXiv 2407.13664): decision-focused losses PL, MER and IFD.

    python -m experiments.run \\
        --config=experiments/configs/dfcl.py:base \\
        --workdir=runs/dfcl

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("dfcl", size)
  config.model.update(
    loss="ifd",
    alpha=1.0,
    prices=(0.1, 0.5, 1.0),
    temperature=3.0,
    min_gap=0.05,
    warmup_share=0.5,
  )
  return config
