"""Wukong (arXiv 2403.02545), stacked factorisation machines, on KuaiRand.

    python -m experiments.run --config=experiments/configs/wukong.py:base \\
        --workdir=runs/wukong

Sizes: `tiny` (seconds), `base` (bundled data, about the FLOPs of RankMixer),
`paper` (l = 4, n_L = n_F = 32, k = 24, MLP of 3 x 2048, d = 160: a row of the
paper's table 5, about 120 million dense parameters, as Wukong has in the
tables of the RankMixer and MSN papers).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("wukong", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    num_layers=2,
    num_fm=16,
    num_linear=16,
    fm_rank=8,
    projection="learned",
    fm_mlp_dims=(128,),
    dense_mlp_dims=(64,),
    # One embedding of width 16 would squeeze 72 numbers.
    num_dense=4,
    mlp_dims=(160, 64),
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(
      num_fm=4,
      num_linear=4,
      fm_rank=4,
      fm_mlp_dims=(16,),
      dense_mlp_dims=(16,),
      mlp_dims=(16,),
    )
  if size == "paper":
    config.model.update(
      embed_dim=160,
      num_layers=4,
      num_fm=32,
      num_linear=32,
      fm_rank=24,
      fm_mlp_dims=(2048, 2048, 2048),
      dense_mlp_dims=(512, 256),
      num_dense=1,
      mlp_dims=(2048, 2048, 2048),
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
