"""Models of behaviour sequences on the bundled KuaiRand log, label click.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/kuairand_sequences.py \\
        --workdir=runs/kuairand_sequences --num_processes=2 \\
        --results=experiments/results/kuairand_sequences

Three streams of each user (watched, liked, watched long), whose events have
times and sides. RankMixer sees the mean of their events, trees how long they
are and how old their last event is. All but DIN and trees mix 8 tokens; what
reads sequences and then mixes has at least HyFormer's FLOPs, which the report
prints. 3 trials over the learning rate, 5 seeds, one pass.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {"optimizer.learning_rate": (1e-3, 2e-3, 4e-3)}
TREES_SPACE = {"trees.learning_rate": (0.02, 0.05, 0.1)}
# Short histories and narrow events, so that a run takes a minute on one core.
SIZE = {
  "data.sequences": ("watch", "like", "long_watch"),
  "data.max_len": 20,
  "model.token_dim": 32,
  "model.num_layers": 2,
  "train.num_epochs": 1,
}
# What reads sequences, and what only has its tokens from elsewhere.
EVENTS = {"model.event_dim": 16}
HEADS = EVENTS | {"model.num_heads": 2}
# The rivals' words; `completejourney_sequences.py` has the same.
RIVALS = {
  "longer": HEADS | {"model.recent_len": 10, "model.mlp_ratio": 3.25},
  "longer_global": HEADS
  | {
    "model.recent_len": 10,
    "model.mlp_ratio": 3.25,
    "model.global_tokens": ("target", "cls", "user", "features"),
  },
  "transformer_rankmixer": HEADS | {"model.mlp_ratio": 3.0},
  "din_rankmixer": EVENTS | {"model.mlp_ratio": 8.0},
}
HYFORMER = HEADS | {
  "model.recent_len": 10,
  "model.encoder_mlp_ratio": 2.0,
  "model.query_dim": 32,
}


def models(size, space=SPACE, trees_space=TREES_SPACE):
  """The rows of a table on the data that `size` names."""

  def model(label, words, recipe=None):
    return common.model(label, f"{recipe or label}:base", size | words, space)

  recipes = {"longer_global": "longer"}
  # Trees and DIN know nothing of tokens.
  plain = {k: v for k, v in size.items() if not k.startswith("model.")}
  tasks = {k: v for k, v in size.items() if k == "model.tasks"}
  return (
    common.model("din", "din:base", plain | tasks, space),
    model("rankmixer", {"model.mlp_ratio": 4.0}),
    *(
      model(label, words, recipes.get(label)) for label, words in RIVALS.items()
    ),
    model("hyformer", HYFORMER),
    common.trees("lightgbm", "rankmixer:base", plain | tasks, trees_space),
  )


def get_sweep() -> Sweep:
  """HyFormer, its rivals, and what does not read sequences in order."""
  return Sweep(
    models=models(SIZE),
    baseline="longer",
    num_trials=3,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
  )
