"""Networks that predict what every treatment would bring each person.

`learner` names the form (Kuenzel et al., Metalearners, arXiv 1706.03461, for
the first two):

* `s`: one network, the treatment is one more input;
* `t`: a network a treatment, nothing shared;
* `shared`: a trunk for all and a head a treatment (TARNet, arXiv 1606.03976);
* `monotone`: as `shared`, but the heads after the first give the increment
  over the treatment before, made positive and summed up, so that an outcome
  never falls with the level (E3IR, arXiv 2408.11623). The treatments must be
  in the order of their level.

Activations have the treatments first, as tokens elsewhere.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.layers.dropout import Dropout
from recjax.layers.per_token import PerTokenDense

LEARNERS = ("s", "t", "shared", "monotone")
INCREMENTS = ("square", "exp")


class OutcomeNetwork(nn.Module):
  """Raw outcomes of each treatment: real numbers, or logits.

  Attributes:
    learner: One of `LEARNERS`.
    num_treatments: Treatments, none among them.
    outcomes: What is predicted, for example `("response", "cost")`.
    mlp_dims: Hidden widths of the trunk.
    head_dims: Hidden widths that follow for each treatment.
    increment: What makes an increment positive: `square` or `exp`.
    dropout_rate: Share of hidden units dropped in training.
    dtype: Type of the hidden layers; outcomes are float32.
  """

  learner: str
  num_treatments: int
  outcomes: tuple[str, ...]
  mlp_dims: tuple[int, ...]
  head_dims: tuple[int, ...] = ()
  increment: str = "square"
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch dim"], *, train: bool
  ) -> dict[str, Float[Array, "batch treatments"]]:
    if self.learner in ("shared", "monotone"):
      for i, width in enumerate(self.mlp_dims):
        x = nn.Dense(width, dtype=self.dtype, name=f"mlp_{i}")(x)
        x = self._activate(x, train)
    x = jnp.broadcast_to(x[None], (self.num_treatments, *x.shape))
    if self.learner == "s":
      level = jnp.eye(self.num_treatments, dtype=x.dtype)[:, None]
      level = jnp.broadcast_to(level, (*x.shape[:2], self.num_treatments))
      x = jnp.concatenate([x, level], axis=-1)
    layer = nn.Dense if self.learner == "s" else PerTokenDense
    hidden = self.head_dims
    if self.learner in ("s", "t"):
      hidden = (*self.mlp_dims, *self.head_dims)
    for i, width in enumerate(hidden):
      x = layer(width, dtype=self.dtype, name=f"head_{i}")(x)
      x = self._activate(x, train)
    raw = layer(len(self.outcomes), dtype=jnp.float32, name="outcomes")(x)
    if self.learner == "monotone":
      raw = accumulate(raw, self.increment)
    return {name: raw[..., i].T for i, name in enumerate(self.outcomes)}

  def _activate(self, x, train):
    return Dropout(self.dropout_rate, deterministic=not train)(nn.relu(x))


def accumulate(
  raw: Float[Array, "treatments batch outcomes"], increment: str
) -> Float[Array, "treatments batch outcomes"]:
  """The first entry plus the sum of the positive increments up to each."""
  positive = jnp.square if increment == "square" else jnp.exp
  steps = jnp.concatenate([raw[:1], positive(raw[1:])], axis=0)
  return jnp.cumsum(steps, axis=0)
