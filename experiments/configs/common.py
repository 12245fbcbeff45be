"""What the recipes share: the KuaiRand log and how all models are trained."""

import ml_collections

from recjax.errors import UserError
from recjax.schema import suggest

SIZES = ("tiny", "base", "paper")


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
