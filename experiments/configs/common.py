"""What the recipes share: their data and how all models are trained."""

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
  _check_size(size)
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


# Trial methods: the trunk and the heads, and how an allocation is learned.
OUTCOME_NETWORK = dict(
  learner="shared",
  mlp_dims=(64, 32),
  head_dims=(32,),
  increment="square",
  embed_dim=8,
  numeric_dim=0,
  dropout_rate=0.0,
  embed_init_scale=0.01,
  dtype="float32",
)


def trial(model_name: str, size: str) -> ml_collections.ConfigDict:
  """Blocks for `model_name` on a randomised trial, all of `two_stage`'s keys.

  The data is Hillstrom's trial; `--config.data.name=synthetic_trial
  --config.data.world=misspecified` is a planted one. Large batches: of T
  treatments only one in T people has the one that a policy names. `paper` is
  the network that DFCL (arXiv 2407.13664) is said to use for several
  treatments; E2E states none that could be read.
  """
  _check_size(size)
  config = ml_collections.ConfigDict()
  config.model_name = model_name
  config.seed = 0
  config.model = dict(OUTCOME_NETWORK)
  config.data = dict(name="hillstrom")
  config.optimizer = dict(
    name="adamw",
    learning_rate=1e-3,
    weight_decay=1e-5,
    clip_norm=1.0,
    schedule="cosine",
    warmup_steps=20,
    ema_decay=0.0,
    # How fast the price of a budget follows the batches; see the model.
    scale_rules=("log_multiplier=30",),
    sparse=dict(name="rowwise_adagrad", learning_rate=0.01, weight_decay=0.0),
  )
  config.train = dict(
    batch_size=4096,
    eval_batch_size=8192,
    num_epochs=0,
    num_train_steps=400,
    eval_every_steps=40,
    log_every_steps=40,
    checkpoint_every_steps=0,
    early_stop_patience=0,
    monitor="valid/trial/eom",
    non_finite="stop",
  )
  config.parallel = dict(mode="mesh", data=1, model=1)
  if size == "tiny":
    config.model.update(mlp_dims=(8,), head_dims=())
    config.train.update(batch_size=512, num_train_steps=20, eval_every_steps=10)
  if size == "paper":
    config.model.update(mlp_dims=(64, 32, 32), head_dims=())
  return config


def _check_size(size: str) -> None:
  if size not in SIZES:
    raise UserError(f"unknown size {size!r} of a recipe" + suggest(size, SIZES))
