"""What the claims share: their form, and users and items in clusters."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int

from recjax.data.columns import Block
from recjax.schema import Feature, Label, Roles, Schema, Split

SHARE = 0.1  # Of the validation and of the test part.


@dataclasses.dataclass(frozen=True)
class Claim:
  """What the function of a claim returns.

  Attributes:
    schema: With `vocab_sizes`.
    draw: From a generator and a number of rows to a block without labels, and
      label -> the rows' logits. Must draw the same, control or not.
    list_values: List feature, or side of one -> all its values, which the
      blocks' `lists` are slices of.
    drifts: Whether the law depends on time: `draw` then also takes the number
      of the first row, counted over all parts.
  """

  schema: Schema
  draw: Callable[..., tuple[Block, dict[str, Float[np.ndarray, " rows"]]]]
  list_values: Mapping[str, Int[np.ndarray, " values"]] = dataclasses.field(
    default_factory=dict
  )
  drifts: bool = False


class Things:
  """Users or items: clusters of equal size and two attributes of no effect."""

  def __init__(self, rng, num: int, num_clusters: int, num_values):
    self.cluster = rng.permutation(np.arange(num) % num_clusters)
    self.effect = standardise(rng.normal(size=num_clusters))
    attributes = [rng.integers(n, size=num) for n in num_values]
    self.columns = {
      "id": np.arange(num),
      "cluster": self.cluster,
      "attribute_0": attributes[0],
      "attribute_1": attributes[1],
    }
    sizes = (num, num_clusters, *num_values)
    self.sizes = dict(zip(self.columns, sizes, strict=True))


def time_schema(vocab_sizes: dict[str, int], extra: list[Feature]) -> Schema:
  """Single ids (row 0 of each vocabulary is unused), then other features."""
  return Schema(
    features=(*(Feature(name, "sparse") for name in vocab_sizes), *extra),
    labels=(Label("click"),),
    roles=Roles(user="user_id", item="item_id", time="row", group="user_id"),
    split=Split(by="time", column="row", valid=SHARE, test=SHARE),
    vocab_sizes=vocab_sizes,
  )


def standardise(values):
  """Mean 0 and mean square 1."""
  values = values - values.mean()
  return values / np.sqrt(np.mean(values**2))
