"""HyFormer (arXiv 2601.12681): queries read sequences layer by layer.

    python -m experiments.run --config=experiments/configs/hyformer.py:base \\
        --workdir=runs/hyformer

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (T = 16 tokens, one
query for each of 3 sequences; the paper states no width, depth or ratio, these
give about its 418M dense parameters and 3.9T FLOPs of 2,048 examples:
`paper_sizes.py`).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("hyformer", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    num_tokens=8,
    token_dim=64,
    num_layers=2,
    num_queries=(1,),
    num_heads=4,
    mlp_ratio=2.0,
    encoder="longer",
    event_dim=32,
    recent_len=50,
    encoder_mlp_ratio=2.0,
    merge_sequences=False,
    query_input="all",
    query_dim=64,
    target_features=(),
    pooled="all",
    paper_literal=False,
    decode_residual=True,
    reinject_features=False,
    head_input="queries_and_mean",
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
      num_tokens=4, token_dim=16, event_dim=8, recent_len=10, query_dim=16
    )
  if size == "paper":
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=1024,
      num_layers=3,
      mlp_ratio=3.75,
      event_dim=256,
      recent_len=50,
      query_dim=512,
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
