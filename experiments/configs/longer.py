"""LONGER, then RankMixer: HyFormer's BaseArch, on the KuaiRand log.

    python -m experiments.run --config=experiments/configs/longer.py:base \\
        --workdir=runs/longer

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (as `hyformer.py`: about
the 386M dense parameters and 3.5T FLOPs that its paper, arXiv 2601.12681,
gives BaseArch).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("longer", size)
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
    num_self_layers=1,
    recent_len=50,
    merge_len=1,
    inner_trans=False,
    encoder_mlp_ratio=2.0,
    global_tokens=("target", "cls", "user"),
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
    config.model.update(num_tokens=4, token_dim=16, event_dim=8, recent_len=10)
  if size == "paper":
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=1024,
      num_layers=3,
      mlp_ratio=3.75,
      event_dim=256,
      recent_len=50,
      encoder_mlp_ratio=4.0,
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
