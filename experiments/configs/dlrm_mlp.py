"""DLRM-MLP (arXiv 1906.00091), the plain base line, on the KuaiRand log.

    python -m experiments.run --config=experiments/configs/dlrm_mlp.py:base \\
        --workdir=runs/dlrm_mlp

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (about 100 million
dense parameters, as DLRM-MLP-100M in the RankMixer paper).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("dlrm_mlp", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    mlp_dims=(256, 128),
    interaction="none",
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(mlp_dims=(16,))
  if size == "paper":
    config.model.update(
      embed_dim=64,
      mlp_dims=(8192, 7168, 2048),
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
