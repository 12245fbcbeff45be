"""From a batch and its embedding rows to the inputs of a network."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax.batch import Batch
from recjax.layers.per_token import PerTokenDense
from recjax.schema import Schema


class FeatureTokens(nn.Module):
  """Cuts the concatenated features into tokens of equal width.

  `x_i = Proj_i(e_input[d (i - 1) : d i])` with one projection a token
  (RankMixer, arXiv 2507.15551, section 3.2). Features are concatenated in the
  order of the schema, so group by meaning there. The input is padded with
  zeros to a multiple of `num_tokens` (our choice).

  Attributes:
    schema: What the batch holds.
    num_tokens: Number of tokens.
    token_dim: Their width.
    numeric_dim: Hinges of each dense feature; see `ConcatFeatures`.
    dtype: Type of the computation.
  """

  schema: Schema
  num_tokens: int
  token_dim: int
  numeric_dim: int = 0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    batch: Batch,
    rows: dict[str, Array],
    extra: Sequence[Float[Array, "batch _"]] = (),
  ) -> Float[Array, "tokens batch dim"]:
    """The tokens of a batch; `extra` are more inputs, behind its features."""
    inputs = ConcatFeatures(
      self.schema, self.numeric_dim, self.dtype, name="inputs"
    )(batch, rows)
    extra = [part.astype(inputs.dtype) for part in extra]
    inputs = jnp.concatenate([inputs, *extra], axis=-1)
    slices = cut_into_tokens(inputs, self.num_tokens)
    return PerTokenDense(self.token_dim, self.dtype, name="project")(slices)


class ConcatFeatures(nn.Module):
  """All features of an example side by side.

  Id features give their embedding (the mean over valid positions for
  sequences and sets), vectors themselves, and dense features themselves or,
  with `numeric_dim`, also that many learned hinges `relu(w x + b)` each, which
  let the next layer bend its response to a number (our choice). `pooled` may
  hold another vector than the mean for some features.

  Attributes:
    schema: What the batch holds.
    numeric_dim: Hinges of each dense feature; 0 for none.
    dtype: Type of the result.
  """

  schema: Schema
  numeric_dim: int = 0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    batch: Batch,
    rows: dict[str, Array],
    pooled: Mapping[str, Array] | None = None,
  ) -> Float[Array, "batch width"]:
    parts = pooled_rows(self.schema, batch, rows, pooled)
    parts += [batch.vectors[f.name] for f in self.schema.vector_features]
    dense = batch.dense
    if dense.shape[-1]:
      parts.append(dense)
      if self.numeric_dim:
        parts.append(self._embed_numbers(dense))
    return jnp.concatenate(parts, axis=-1).astype(self.dtype)

  def _embed_numbers(
    self, dense: Float[Array, "batch num_dense"]
  ) -> Float[Array, "batch width"]:
    shape = (dense.shape[-1], self.numeric_dim)
    slope = self.param("slope", jax.nn.initializers.normal(1.0), shape)
    # Knots spread over the standardised range.
    knots = self.param("knots", jax.nn.initializers.normal(1.0), shape)
    hinges = jax.nn.relu(dense[..., None] * slope[None] + knots[None])
    return hinges.reshape(dense.shape[0], -1)


def cut_into_tokens(
  inputs: Float[Array, "batch width"], num_tokens: int
) -> Float[Array, "tokens batch slice"]:
  """Slices of equal width, the last one filled up with zeros."""
  width = -(-inputs.shape[-1] // num_tokens)
  padding = width * num_tokens - inputs.shape[-1]
  inputs = jnp.pad(inputs, ((0, 0), (0, padding)))
  return inputs.reshape(-1, num_tokens, width).swapaxes(0, 1)


def concat_width(schema: Schema, embed_dim: int, numeric_dim: int = 0) -> int:
  """Width of what `ConcatFeatures` gives for these settings."""
  return (
    len(schema.id_features) * embed_dim
    + sum(feature.dim for feature in schema.vector_features)
    + len(schema.dense_features) * (1 + numeric_dim)
  )


def pooled_rows(
  schema: Schema,
  batch: Batch,
  rows: dict[str, Array],
  pooled: Mapping[str, Array] | None = None,
) -> list[Float[Array, "batch dim"]]:
  """One vector per id feature; the mean of valid positions for lists.

  Args:
    schema: What the batch holds.
    batch: The examples.
    rows: Feature name -> embeddings of its ids; of a list perhaps their mean
      (serving pools a user's lists once).
    pooled: Feature name -> the vector that stands for it, for the features
      that the caller has pooled in a way of its own.
  """
  pooled = pooled or {}
  vectors = []
  for feature in schema.id_features:
    name = feature.name
    if name in pooled:
      vectors.append(pooled[name])
    elif feature.is_list and rows[name].ndim == 3:
      vectors.append(masked_mean(rows[name], batch.id_mask[name]))
    else:
      vectors.append(rows[name])
  return vectors


def masked_mean(
  values: Float[Array, "batch max_len dim"], mask: Bool[Array, "batch max_len"]
) -> Float[Array, "batch dim"]:
  """Mean over valid positions; zeros where none is valid."""
  weights = mask.astype(values.dtype)
  count = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1.0)
  return jnp.einsum("bl,bld->bd", weights / count, values)
