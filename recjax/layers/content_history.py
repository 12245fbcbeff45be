"""A history of content vectors as inputs of a ranker (LEMUR, arXiv 2511.10962).

`users` is as many as examples, or one whose history all examples share.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax.layers.contrastive import normalize


class HistoryDecoder(nn.Module):
  """`a = softmax_j(Q_l . d_j)`, `Q_l+1 = FFN(sum_j a_j d_j)`.

  Cross-attention and a feed-forward network, without attention within the
  history, keys, values or a residual. Q_1 is a projection of what asks.

  Attributes:
    num_layers: Layers.
    mlp_dim: Inner width of the feed-forward networks.
    scale: Divides the scores by the root of the width.
    dtype: Type of the feed-forward networks.
  """

  num_layers: int
  mlp_dim: int
  scale: bool
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(
    self,
    asked: Float[Array, "batch features"],
    history: Float[Array, "users length dim"],
    mask: Bool[Array, "users length"],
  ) -> Float[Array, "batch dim"]:
    dim = history.shape[-1]
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, dtype=self.dtype, name=name
    )
    query = dense(dim, "query")(asked)
    for i in range(self.num_layers):
      query = query.astype(jnp.float32)
      weights = attention_weights(query, history, mask, self.scale)
      attended = jnp.matmul(weights[:, None], history)[:, 0]
      hidden = nn.gelu(dense(self.mlp_dim, f"up_{i}")(attended))
      query = dense(dim, f"down_{i}")(hidden)
    return query


def attention_weights(
  query: Float[Array, "batch dim"],
  history: Float[Array, "users length dim"],
  mask: Bool[Array, "users length"],
  scale: bool,
) -> Float[Array, "batch length"]:
  """`softmax_j(Q . d_j)` over valid events; zeros where there is none."""
  scores = jnp.matmul(history, query[..., None])[..., 0]
  if scale:
    scores = scores * query.shape[-1] ** -0.5
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
  return jnp.where(mask, weights, 0.0)


def similarities(
  document: Float[Array, "batch dim"],
  history: Float[Array, "users length dim"],
  mask: Bool[Array, "users length"],
) -> list[Float[Array, "batch length"]]:
  """Cosine to each event, 0 where it is missing; and all in falling order."""
  found = jnp.matmul(normalize(history), normalize(document)[..., None])[..., 0]
  ranked = jnp.sort(jnp.where(mask, found, -1.0), axis=-1, descending=True)
  return [jnp.where(mask, found, 0.0), ranked]
