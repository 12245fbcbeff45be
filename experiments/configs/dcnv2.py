"""DCN-V2 (arXiv 2008.13535), cross layers and an MLP, on the KuaiRand log.

    python -m experiments.run --config=experiments/configs/dcnv2.py:base \\
        --workdir=runs/dcnv2

Sizes: `tiny` (seconds), `base` (bundled data; DLRM-MLP with two cross layers
before it, about the FLOPs of RankMixer), `paper` (two cross layers of rank 512
and an MLP of 4 x 2048, the DCN-V2 that the Wukong paper, arXiv 2403.02545,
lists at 3 GFLOPs; on these features about the 22 million dense parameters of
the DCN-V2 in the RankMixer paper).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("dcnv2", size)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    structure="stacked",
    num_cross_layers=2,
    low_rank=32,
    num_experts=1,
    expert_gate="softmax",
    expert_activation="identity",
    mlp_dims=(256, 128),
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(low_rank=4, mlp_dims=(16,))
  if size == "paper":
    config.model.update(
      embed_dim=64,
      low_rank=512,
      mlp_dims=(2048, 2048, 2048, 2048),
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config
