"""The pytree that flows from the pipeline into every model, loss and metric."""

import typing
from collections.abc import Mapping

from flax import struct
from jaxtyping import Array, Bool, Float, Int


@typing.no_type_check  # Holds shardings and shape structs as well as arrays.
@struct.dataclass
class TrialRows:
  """What a randomised trial drew and saw, one entry an example.

  All are 0 for padding: divide by no propensity without `example_mask`.

  Attributes:
    treatment: Number of the treatment in `Schema.trial.treatments`; 0 is the
      control.
    response: Outcome that counts, in the unit of the data.
    cost: What the example has cost, at least 0, in the unit of the data.
    propensity: Chance, in (0, 1], of the treatment that the example got.
    cluster: Examples of one number were drawn together.
  """

  treatment: Int[Array, " batch"]
  response: Float[Array, " batch"]
  cost: Float[Array, " batch"]
  propensity: Float[Array, " batch"]
  cluster: Int[Array, " batch"]


@typing.no_type_check  # Holds shardings and shape structs as well as arrays.
@struct.dataclass
class Batch:
  """Examples of one step, padded to a fixed size.

  Masks are True where a value counts; nothing may infer a mask from values.

  Attributes:
    dense: Standardised real-valued features, columns in the order of
      `Schema.dense_features`.
    ids: Feature name -> row in the feature's vocabulary: `[batch]`, or
      `[batch, max_len]` for sequences (oldest first, each side column beside
      its sequence) and multi-valued features. Row 0 is "out of vocabulary";
      masked positions come last and hold 0. A batch may be cut to the longest
      sequence that it holds: take `max_len` from the array.
    id_mask: Feature name -> valid positions, for the features with a
      `[batch, max_len]` entry in `ids`.
    vectors: Feature name -> `[batch, dim]` content vectors.
    labels: Label name -> outcome; binary labels are 0 or 1, real ones are in
      the label's unit. 0 where missing.
    label_mask: Label name -> True where the outcome was observed.
    scenario: Scenario of each example; 0 where the data has none.
    groups: `"group"` (what GAUC groups by) and `"query"` (what QAUC groups
      by), where the data has them, as dense numbers.
    example_mask: False for the padding of a last partial batch.
    event_age: Sequence -> seconds from each event to the example's own time,
      above 0, in float32, which holds no absolute time to the second; 0 where
      masked. For the sequences whose schema names `time`.
    trial: What was drawn and seen, if the data is a randomised trial. Not an
      input: it is None when a model serves.
    tokens: Text feature -> subword numbers, 0 where masked.
    token_mask: Text feature -> valid positions, the first ones of each row.
    real_labels: Names of the labels that are real-valued; the others are
      binary. Static under `jit`.
  """

  dense: Float[Array, "batch num_dense"]
  ids: Mapping[str, Int[Array, "batch ..."]]
  id_mask: Mapping[str, Bool[Array, "batch max_len"]]
  vectors: Mapping[str, Float[Array, "batch dim"]]
  labels: Mapping[str, Float[Array, " batch"]]
  label_mask: Mapping[str, Bool[Array, " batch"]]
  scenario: Int[Array, " batch"]
  groups: Mapping[str, Int[Array, " batch"]]
  example_mask: Bool[Array, " batch"]
  event_age: Mapping[str, Float[Array, "batch max_len"]] = struct.field(
    default_factory=dict
  )
  trial: TrialRows | None = None
  tokens: Mapping[str, Int[Array, "batch max_len"]] = struct.field(
    default_factory=dict
  )
  token_mask: Mapping[str, Bool[Array, "batch max_len"]] = struct.field(
    default_factory=dict
  )
  real_labels: frozenset[str] = struct.field(
    pytree_node=False, default=frozenset()
  )

  @property
  def size(self) -> int:
    """Number of examples, padding included."""
    return self.example_mask.shape[0]
