"""MDL (arXiv 2602.07520) on the tabs and labels of the KuaiRand log.

    python -m experiments.run --config=experiments/configs/mdl.py:base \\
        --workdir=runs/mdl

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (16 tokens of 1024 and 2
layers; the paper tells neither). A scenario's prior are the rates of the user,
the video and the author in it.
"""

from experiments.configs import common

_PRIORS = tuple(
  f"{outcome}_rate_{key}_tab"
  for key in ("user", "video", "author")
  for outcome in ("click", "long_view")
)


def get_config(size: str = "base"):
  config = common.kuairand_tabs("mdl", size)
  config.model.update(
    body="rankmixer",
    mode="layerwise",
    num_heads=4,
    domain_dim=16,
    important_features=("user_id", "video_id"),
    scenario_priors=(dict(token="all", features=_PRIORS),),
    task_tokens=True,
    scenario_tokens=True,
    global_token=True,
    scenario_attention=True,
    task_attention="attention",
    ffn_residual=True,
    pre_norm=True,
    final_norm=True,
    output_projection="per_token",
    # A task's token is its own tower.
    head_dim=0,
  )
  if size == "tiny":
    config.model.update(num_heads=2, domain_dim=4)
  if size == "paper":
    config.model.update(num_heads=8, domain_dim=64)
  return config
