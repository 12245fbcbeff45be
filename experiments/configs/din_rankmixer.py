"""DIN's pooling of each sequence, then RankMixer, on the KuaiRand log.

    python -m experiments.run \\
        --config=experiments/configs/din_rankmixer.py:base \\
        --workdir=runs/din_rankmixer

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (no paper gives this
pair's size; the RankMixer of `longer.py`).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("din_rankmixer", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    num_tokens=8,
    token_dim=64,
    num_layers=2,
    mlp_ratio=2.0,
    event_dim=32,
    attention_dims=(36,),
    normalization="none",
    activation="dice",
    target_features=(),
    head_dim=0,
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(
      num_tokens=4, token_dim=16, event_dim=8, attention_dims=(8,)
    )
  if size == "paper":
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=1024,
      num_layers=3,
      mlp_ratio=3.75,
      event_dim=256,
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
