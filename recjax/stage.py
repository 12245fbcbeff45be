"""One part of a training that has several."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """What is trained in it, on which loss and for how long.

  Attributes:
    name: Shown in logs.
    share: Share of the training steps; the shares of all stages are scaled to
      sum to 1.
    trainable: Regular expressions on parameter and table paths such as
      `heads/click/kernel` or `embedding`; what none matches is frozen.
    loss_fn: The stage's loss; None means the file's `loss_fn`.
    initialize_from: `previous`: go on from where the previous stage ended;
      `best`: from its best evaluation; `scratch`: new parameters and tables.
    empty_banks: Whether banks begin the stage empty: what an earlier stage put
      there may be of another encoder.
    predictions: Entry of `aux`, task -> logit, that validation looks at while
      the stage is trained: what comes after it in the model is not trained
      yet. Empty for the model's predictions.
  """

  name: str = "train"
  share: float = 1.0
  trainable: tuple[str, ...] = (".*",)
  loss_fn: Callable[..., Any] | None = None
  initialize_from: str = "previous"
  empty_banks: bool = False
  predictions: str = ""

  def __post_init__(self):
    if self.initialize_from not in ("previous", "best", "scratch"):
      raise ValueError(
        "initialize_from must be 'previous', 'best' or 'scratch', got "
        f"{self.initialize_from!r}"
      )
