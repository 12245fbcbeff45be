"""LEMUR's encoders trained first and then frozen, on MovieLens titles.

    python -m experiments.run \\
        --config=experiments/configs/two_stage_content.py:base \\
        --workdir=runs/two_stage_content

Everything as in `lemur.py`, but twice the steps: each stage has half of them,
and no early stop, since the first stage trains no ranker.
"""

from experiments.configs import lemur


def get_config(size: str = "base"):
  config = lemur.get_config(size)
  config.model_name = "two_stage_content"
  config.train.update(early_stop_patience=0)
  if config.train.num_train_steps:
    config.train.num_train_steps *= 2
  else:
    config.train.num_epochs *= 2
  return config
