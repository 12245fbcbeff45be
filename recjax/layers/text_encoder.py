"""A Transformer that turns the tokens of some texts into one vector.

`[CLS] field_1 [SEP] field_2 [SEP] ... field_F`, each position the sum of its
token's embedding, its position's and its field's (type), through bidirectional
layers; the vector is what comes out at CLS. Vaswani et al., arXiv 1706.03762;
Devlin et al., BERT, arXiv 1810.04805.

Our choice: normalisation before each part and after the last layer (Xiong et
al., arXiv 2002.04745), GELU, SEP is of the field before it, and a token's
position is its place in the stream of padded fields. The last layer is computed
at CLS alone: the others' outputs are not used.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recjax.errors import UserError

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Shape of the encoders of queries and documents.

  Attributes:
    dim: Width of tokens and vectors.
    num_heads: Attention heads; divides `dim`.
    mlp_dim: Inner width of the feed-forward networks.
    query_layers: Transformer layers of a query.
    document_layers: Transformer layers of a document.
  """

  dim: int = 128
  num_heads: int = 4
  mlp_dim: int = 512
  query_layers: int = 2
  document_layers: int = 4

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise UserError(
          f"model.encoder.{field.name} must be at least 1, got "
          f"{getattr(self, field.name)}"
        )
    if self.dim % self.num_heads:
      raise UserError(
        f"model.encoder.dim ({self.dim}) must be a multiple of "
        f"model.encoder.num_heads ({self.num_heads})"
      )


class TextEncoder(nn.Module):
  """The vector of a text of several fields.

  Attributes:
    config: Heads and inner width.
    num_layers: Transformer layers, at least 1.
    dtype: Type of the computation; the result is float32.
  """

  config: EncoderConfig
  num_layers: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    embedding: Float[Array, "vocab dim"],
    tokens: Sequence[Int[Array, "batch _"]],
    masks: Sequence[Bool[Array, "batch _"]],
  ) -> Float[Array, "batch dim"]:
    """Encodes texts.

    Args:
      embedding: Of each token.
      tokens: The fields, in their order.
      masks: Valid positions of each; a text without any is its CLS alone.
    """
    x, mask = self._stream(embedding, tokens, masks)
    for i in range(self.num_layers):
      is_last = i + 1 == self.num_layers
      x = EncoderLayer(
        self.config.num_heads,
        self.config.mlp_dim,
        self.dtype,
        name=f"layer_{i}",
      )(x, mask, 1 if is_last else x.shape[1])
    x = nn.LayerNorm(dtype=self.dtype, name="norm")(x[:, 0])
    return x.astype(jnp.float32)

  def _stream(self, embedding, tokens, masks):
    """The embedded stream and its valid positions."""
    batch, dim = tokens[0].shape[0], embedding.shape[-1]
    types = self.param("type", _INIT, (len(tokens), dim))
    one = jnp.ones((batch, 1), bool)
    special = lambda name: jnp.broadcast_to(  # noqa: E731
      self.param(name, _INIT, (1, 1, dim)), (batch, 1, dim)
    )
    parts, valid = [special("cls") + types[None, :1]], [one]
    if len(tokens) > 1:
      separator = special("sep")
    for i, (field, mask) in enumerate(zip(tokens, masks, strict=True)):
      if i:
        parts.append(separator + types[None, i - 1 : i])
        valid.append(one)
      parts.append(embedding[field] + types[None, i : i + 1])
      valid.append(mask)
    x = jnp.concatenate(parts, axis=1)
    x = x + self.param("position", _INIT, (1, *x.shape[1:]))
    return x.astype(self.dtype), jnp.concatenate(valid, axis=1)


class EncoderLayer(nn.Module):
  """`y = x + Attention(LN(x))`, then `y + FFN(LN(y))`, at the first positions.

  Attributes:
    num_heads: Attention heads.
    mlp_dim: Inner width of the feed-forward network.
    dtype: Type of the computation.
  """

  num_heads: int
  mlp_dim: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "batch seq_len dim"],
    mask: Bool[Array, "batch seq_len"],
    num_out: int,
  ) -> Float[Array, "batch num_out dim"]:
    batch, _, dim = x.shape
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, dtype=self.dtype, name=name
    )
    heads = lambda y: y.reshape(  # noqa: E731
      batch, y.shape[1], self.num_heads, dim // self.num_heads
    )
    y = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x)
    attended = jax.nn.dot_product_attention(
      heads(dense(dim, "query")(y[:, :num_out])),
      heads(dense(dim, "key")(y)),
      heads(dense(dim, "value")(y)),
      mask=mask[:, None, None],
    )
    x = x[:, :num_out] + dense(dim, "out")(attended.reshape(batch, -1, dim))
    y = nn.LayerNorm(dtype=self.dtype, name="ffn_norm")(x)
    return x + dense(dim, "down")(nn.gelu(dense(self.mlp_dim, "up")(y)))
