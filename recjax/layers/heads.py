"""Task heads: one small network a task on a shared representation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.layers.dropout import Dropout
from recjax.layers.per_token import PerTokenDense


class TaskHeads(nn.Module):
  """One logit a task: `Dense(1)(GELU(Dense(hidden_dim)(x)))`.

  The papers name the heads only; one hidden layer is our choice.

  Attributes:
    tasks: Names of the tasks.
    hidden_dim: Width of the hidden layer; 0 for a linear head.
    dropout_rate: Share of hidden units dropped in training.
    dtype: Type of the hidden layer; the logit is float32.
  """

  tasks: tuple[str, ...]
  hidden_dim: int = 0
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch dim"], *, train: bool
  ) -> dict[str, Float[Array, " batch"]]:
    logits = {}
    for task in self.tasks:
      hidden = x
      if self.hidden_dim:
        hidden = nn.Dense(
          self.hidden_dim, dtype=self.dtype, name=f"{task}_hidden"
        )(x)
        hidden = nn.gelu(hidden)
        hidden = Dropout(self.dropout_rate, deterministic=not train)(hidden)
      logits[task] = nn.Dense(1, dtype=jnp.float32, name=task)(hidden)[..., 0]
    return logits


class TaskTowers(nn.Module):
  """The heads of `TaskHeads` on an input of its own for each task.

  All tasks are computed at once, as tokens with own weights.

  Attributes:
    tasks: Names of the tasks.
    hidden_dim: Width of the hidden layer; 0 for a linear head.
    dropout_rate: Share of hidden units dropped in training.
    dtype: Type of the hidden layer; the logit is float32.
  """

  tasks: tuple[str, ...]
  hidden_dim: int = 0
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "tasks batch dim"], *, train: bool
  ) -> dict[str, Float[Array, " batch"]]:
    if self.hidden_dim:
      x = PerTokenDense(self.hidden_dim, self.dtype, name="hidden")(x)
      x = Dropout(self.dropout_rate, deterministic=not train)(nn.gelu(x))
    logits = PerTokenDense(1, jnp.float32, name="logit")(x)[..., 0]
    return dict(zip(self.tasks, logits, strict=True))
