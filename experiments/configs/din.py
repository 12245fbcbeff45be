"""DIN (arXiv 1706.06978), histories weighted by the target, on KuaiRand.

    python -m experiments.run --config=experiments/configs/din.py:base \\
        --workdir=runs/din

Sizes: `tiny` (seconds), `base` (bundled data, about the FLOPs of RankMixer),
`paper` (embeddings of width 12, activation units of 36, MLP of 200 x 80: the
network that the paper trained on Alibaba's log).

The paper's mini-batch aware regularisation is
`--config.optimizer.sparse.weight_decay`, 0 here as in every recipe.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("din", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    attention_dims=(24,),
    normalization="none",
    mlp_dims=(160, 64),
    activation="dice",
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(attention_dims=(8,), mlp_dims=(16,))
  if size == "paper":
    config.model.update(
      embed_dim=12,
      attention_dims=(36,),
      mlp_dims=(200, 80),
      dropout_rate=0.0,
    )
  return config
