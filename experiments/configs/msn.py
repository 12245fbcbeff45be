"""MSN (arXiv 2602.07526): RankMixer gated by a product-key memory, on KuaiRand.

    python -m experiments.run --config=experiments/configs/msn.py:base \\
        --workdir=runs/msn

Sizes: `tiny` (seconds), `base` (bundled data; one memory, for a second costs
0.001 of validation AUC there: `sweeps/msn_ablation.py`), `paper` (a memory of
256 ** 2 slots in each of 2 layers, 32 read; T = 16 and D = 1024 fit the paper's
tables).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("msn", size)
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
    memory_layers=(0,) if size == "base" else (0, 1),
    gate="tanh",
    memory=dict(
      num_keys=64,
      key_dim=32,
      top_k=16,
      num_heads=1,
      query_scope="per_token",
      value_scope="shared",
      shared_query=False,
      use_layer_norm=True,
      use_over_parameterization=True,
      theta_side="right",
      freeze_base_keys=False,
      value_init_scale=1.0,
      value_learning_rate=1.0,
      value_dtype="float32",
    ),
  )
  # MSN warms up from 0.1 % of the rate so that many slots are explored first.
  config.optimizer.update(warmup_steps=30, warmup_from=1e-3)
  if size == "tiny":
    config.model.update(num_tokens=4, token_dim=16)
    config.model.memory.update(num_keys=16, key_dim=8, top_k=4)
  if size == "paper":
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=1024,
      mlp_ratio=2.0,
      dropout_rate=0.0,
      dtype="bfloat16",
    )
    config.model.memory.update(num_keys=256, key_dim=64, top_k=32)
    config.optimizer.update(warmup_steps=50_000)
  return config
