"""Contrastive losses inside a batch, as sums and weights."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recjax.errors import UserError
from recjax.schema import suggest

NEGATIVES = ("batch", "positives")
_EXCLUDED = -1e9


@dataclasses.dataclass(frozen=True)
class ContrastConfig:
  """The contrastive losses of LEMUR, arXiv 2511.10962.

  Attributes:
    weight: Of the contrast between query and document (SQDC).
    scale: What multiplies cosines; the paper's temperature.
    negatives: Of an anchor: all documents of the `batch`, or those of its
      `positives`.
    session_mask: Leaves out documents of the anchor's own query.
    mask_same_document: Leaves out copies of the anchor's document.
    id_weight: Of the contrast between content and id embedding (CIC).
  """

  weight: float = 0.1
  scale: float = 50.0
  negatives: str = "batch"
  session_mask: bool = True
  mask_same_document: bool = False
  id_weight: float = 0.0

  def __post_init__(self):
    if self.negatives not in NEGATIVES:
      raise UserError(
        f"unknown model.contrast.negatives {self.negatives!r}"
        + suggest(self.negatives, NEGATIVES)
      )
    if min(self.weight, self.id_weight) < 0 or self.scale <= 0:
      raise UserError(
        "model.contrast: weights must be at least 0 and scale above 0, got "
        f"{self.weight}, {self.id_weight} and {self.scale}"
      )


def session_contrast(
  query: Float[Array, "batch dim"],
  document: Float[Array, "batch dim"],
  *,
  is_positive: Bool[Array, " batch"],
  is_trained: Bool[Array, " batch"],
  is_present: Bool[Array, " batch"],
  is_same: Bool[Array, "batch batch"],
  session_id: Int[Array, " batch"] | None,
  config: ContrastConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """SQDC: of an anchor's query, its document against those of other queries.

  Args:
    query: Vectors of the queries.
    document: Vectors of the documents.
    is_positive: Examples with a positive label.
    is_trained: Documents with a gradient; the anchors are the positive ones.
    is_present: Documents that have a vector.
    is_same: Which examples have the same document.
    session_id: Number of each query; None for no session mask.
    config: What counts as a negative.

  Returns:
    The sum over anchors and their number.
  """
  if config.negatives == "positives":
    is_present &= is_positive
  is_candidate = jnp.broadcast_to(is_present[None], is_same.shape)
  if session_id is not None:
    is_candidate &= session_id[:, None] != session_id[None]
  if config.mask_same_document:
    is_candidate &= ~is_same
  return info_nce(
    query, document, is_positive & is_trained, is_candidate, config.scale
  )


def info_nce(
  anchors: Float[Array, "batch dim"],
  partners: Float[Array, "batch dim"],
  is_anchor: Bool[Array, " batch"],
  is_candidate: Bool[Array, "batch batch"],
  scale: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """`-log(exp(s c_ii) / sum_j A_ij exp(s c_ij))`, summed over anchors i.

  c_ij is the cosine of anchor i and partner j.

  Args:
    anchors: One an example.
    partners: One an example; that of the same example is the right one.
    is_anchor: Examples whose loss counts.
    is_candidate: A; which partners stand in the sum. The right one always does.
    scale: s, which multiplies the cosine.

  Returns:
    The sum and the number of anchors.
  """
  logits = scale * (normalize(anchors) @ normalize(partners).T)
  logits = jnp.where(
    is_candidate | jnp.eye(len(logits), dtype=bool), logits, _EXCLUDED
  )
  values = -jnp.diagonal(jax.nn.log_softmax(logits, axis=-1))
  return (
    jnp.sum(jnp.where(is_anchor, values, 0.0)),
    jnp.sum(is_anchor.astype(jnp.float32)),
  )


def cosine(
  a: Float[Array, "*shape dim"], b: Float[Array, "*shape dim"]
) -> Float[Array, "*shape"]:
  """Cosine over the last axis, in float32; 0 where a vector is 0."""
  a, b = normalize(a), normalize(b)
  return jnp.einsum("...d,...d->...", a, b)


def normalize(x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
  """Vectors of length 1; a vector of zeros stays one, with finite gradients."""
  x = x.astype(jnp.float32)
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
