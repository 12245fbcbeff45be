"""What the recipes share: the KuaiRand log and how all models are trained."""

import ml_collections

from recjax.errors import UserError
from recjax.schema import suggest

SIZES = ("tiny", "base", "paper")
# What the KuaiRand log knows of an exposure; follows and the like are rare.
KUAIRAND_TASKS = (
  "click",
  "long_view",
  "like",
  "follow",
  "comment",
  "forward",
  "profile_enter",
  "play_time",
)


def kuairand(model_name: str, size: str) -> ml_collections.ConfigDict:
  """Blocks for `model_name` on the bundled KuaiRand log, all but `model`.

  Every model of a table gets the same budget: one set of optimiser settings,
  epochs and early stop.
  """
  if size not in SIZES:
    raise UserError(f"unknown size {size!r} of a recipe" + suggest(size, SIZES))
  config = ml_collections.ConfigDict()
  config.model_name = model_name
  config.seed = 0
  config.data = dict(name="kuairand")
  config.optimizer = dict(
    name="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    schedule="cosine",
    warmup_steps=30,
    ema_decay=0.99,
    scale_rules=(),
    sparse=dict(name="rowwise_adagrad", learning_rate=0.01, weight_decay=0.0),
  )
  config.train = dict(
    batch_size=512,
    eval_batch_size=512,
    num_epochs=2,
    num_train_steps=0,
    # Twice an epoch. The second pass over-fits, so the first evaluation that
    # is worse than the one before ends the run.
    eval_every_steps=132,
    log_every_steps=40,
    checkpoint_every_steps=0,
    early_stop_patience=1,
    non_finite="stop",
  )
  config.parallel = dict(mode="mesh", data=1, model=1)
  if size == "tiny":
    config.train.update(num_train_steps=20, eval_every_steps=10)
  return config


def kuairand_tabs(model_name: str, size: str) -> ml_collections.ConfigDict:
  """`kuairand` with its 6 large tabs as scenarios and all its labels as tasks.

  The recipes of the methods for several scenarios and tasks: the same trunk,
  data and training for all.
  """
  config = kuairand(model_name, size)
  # Tabs of fewer rows in the training part count as one, the unknown one.
  config.data.min_tab_rows = 600
  config.model = dict(
    tasks=KUAIRAND_TASKS,
    embed_dim=16,
    num_tokens=8,
    token_dim=64,
    num_layers=2,
    mlp_ratio=2.0,
    head_dim=32,
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
    balance=dict(kind="none"),
  )
  if size == "tiny":
    config.model.update(num_tokens=4, token_dim=16, head_dim=8)
  if size == "paper":
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=1024,
      head_dim=256,
      dropout_rate=0.0,
      dtype="bfloat16",
    )
  return config


def cold_start(model_name: str, size: str) -> ml_collections.ConfigDict:
  """Blocks of a method on PROMO's backbone, on KuaiRand with feedback lists.

  `model` holds what all of them share. Towers can use what belongs to one side
  alone, so the rates of pairs are left out. Parts that are frozen later must
  not be averaged: no running average.
  """
  config = kuairand(model_name, size)
  config.data.feedback = "pinnacle"
  config.optimizer.update(
    learning_rate=3e-3, weight_decay=1e-4, schedule="constant", ema_decay=0.0
  )
  config.optimizer.sparse.learning_rate = 0.05
  # Over all stages; each ends when an evaluation is worse than its best.
  config.train.update(num_epochs=6, early_stop_patience=2)
  config.model = dict(
    tasks=("click",),
    embed_dim=16,
    towers=dict(
      user_features=(
        "tab",
        "hour",
        "user_active_degree",
        "register_days_range",
        "follow_user_num_range",
        "fans_user_num_range",
        "friend_user_num_range",
        "long_view_rate_user",
        "click_rate_user",
        "count_user",
      ),
      item_features=(
        "author_id",
        "music_id",
        "music_type",
        "video_type",
        "upload_type",
        "tag",
        "duration_bucket",
        "video_age_bucket",
      ),
      history="positive_history",
      num_blocks=2,
      num_heads=4,
    ),
    dropout_rate=0.1,
    embed_init_scale=0.05,
    dtype="float32",
  )
  if size == "tiny":
    config.model.update(embed_dim=8)
    config.model.towers.update(num_blocks=1, num_heads=2)
    config.train.update(num_train_steps=24, eval_every_steps=8)
  if size == "paper":
    # The released run: batches of 128, Adam at 1e-3, one seventh of it tuned.
    config.train.update(batch_size=128, num_epochs=70)
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    config.optimizer.sparse.update(name="lazy_adam", learning_rate=1e-3)
  return config
