"""A Transformer over each sequence, then RankMixer, on the KuaiRand log.

    python -m experiments.run \\
        --config=experiments/configs/transformer_rankmixer.py:base \\
        --workdir=runs/transformer_rankmixer

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (as `hyformer.py`: about
the 388M dense parameters and 6.6T FLOPs that its paper, arXiv 2601.12681,
gives this pair).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("transformer_rankmixer", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    num_tokens=8,
    token_dim=64,
    num_layers=2,
    mlp_ratio=2.0,
    event_dim=32,
    num_queries=1,
    num_heads=4,
    num_encoder_layers=2,
    encoder_mlp_ratio=2.0,
    target_features=(),
    attention="xla",
    attention_chunk=0,
    remat=False,
    head_dim=0,
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(
      num_tokens=4, token_dim=16, event_dim=8, num_encoder_layers=1
    )
  if size == "paper":
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=1024,
      num_layers=3,
      mlp_ratio=3.75,
      event_dim=256,
      num_encoder_layers=1,
      encoder_mlp_ratio=2.0,
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
