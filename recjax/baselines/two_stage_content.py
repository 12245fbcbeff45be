"""Two-stage content: LEMUR's encoders, trained first and then frozen.

What LEMUR, arXiv 2511.10962, is measured against: the same text, encoders,
contrastive loss (SQDC), bank, decoders and ranker. The first stage trains the
encoders by SQDC alone; the second, with an empty bank, freezes them and trains
the ranker on their vectors. So what differs is the gradient of the ranker in
the encoders, and nothing else.

Each stage takes half of the steps: give the run twice those of LEMUR and the
ranker has as many. The validation score says nothing in the first stage, where
no ranker is trained: `train.early_stop_patience` must be 0. Our choice.
"""

import dataclasses
from typing import Any

from jaxtyping import Array

from recjax import losses
from recjax.baselines import rankmixer
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.models import lemur
from recjax.stage import Stage


@dataclasses.dataclass(frozen=True)
class Config(lemur.Config):
  """LEMUR's fields; the contrast must have a weight."""

  def __post_init__(self):
    super().__post_init__()
    if not self.contrast.weight:
      raise UserError(
        "model.contrast.weight must be above 0: nothing else trains the "
        "encoders of two_stage_content"
      )


Model = lemur.Model
tables = lemur.tables
diagnostics = lemur.diagnostics
idle_params = lemur.idle_params


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The ranker's terms: encoders that are frozen have no contrast."""
  return rankmixer.loss_fn(predictions, aux, batch, config)


def content_loss(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The contrast alone."""
  terms = lemur.loss_fn(predictions, aux, batch, config)
  return {"sqdc": terms["sqdc"]}


_ENCODERS = "(token_embedding|document_encoder|query_encoder)"
STAGES = (
  Stage("content", trainable=(f"{_ENCODERS}.*",), loss_fn=content_loss),
  Stage("rank", trainable=(f"(?!{_ENCODERS}).*",), empty_banks=True),
)
