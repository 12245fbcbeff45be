"""RankMixer (arXiv 2507.15551) on the KuaiRand log.

    python -m experiments.run --config=experiments/configs/rankmixer.py:base \\
        --workdir=runs/rankmixer

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (RankMixer-100M:
16 tokens of width 768, 2 layers; compiled for a mesh, not trained here).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("rankmixer", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    num_tokens=8,
    token_dim=64,
    num_layers=2,
    mlp_ratio=2.0,
    head_dim=0,
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(num_tokens=4, token_dim=16)
  if size == "paper":
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=768,
      # Not in the paper; with it the layers hold its 107M parameters.
      mlp_ratio=17 / 6,
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
