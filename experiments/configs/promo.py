"""PROMO (arXiv 2412.18082), prompts from pinnacle feedback, on KuaiRand.

    python -m experiments.run --config=experiments/configs/promo.py:base \\
        --workdir=runs/promo

Sizes: `tiny` (seconds), `base` (bundled data; the last layer begins at the
backbone and the losses are means over pairs), `paper` (the released
configuration: width 16, 50 events, 10 users, sums, Xavier; 30, 20 and 20 epochs
of 128 rows). The lists are of the best users by stay and interactions;
`--config.data.feedback=recent` takes the latest, as the released code does.
`--config.data.protocol=released` repeats its evaluation, in which a positive
row finds itself in its lists: for comparison only.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("promo", size)
  config.model.update(
    positive_list="pinnacle_users",
    negative_list="negative_users",
    popularity="item_positives",
    popular_from=5,
    prompt_from="feedback",
    network="generated",
    hidden_dim=16,
    use_relu=False,
    pooling="sum",
    prompt_tables="own",
    fusion="identity",
    normalization="mean",
    pfpe_weight=0.01,
    pape_weight=0.01,
  )
  if size == "paper":
    config.model.update(fusion="xavier", normalization="sum")
  return config
