"""Per-token networks that open on demand: a dense gate, experts, ReLU experts.

Sources: MSN, arXiv 2602.07526 (GatedFFN and SMoE, the base lines of a memory;
their inside is not stated, so it is our choice); Zhu et al., RankMixer, arXiv
2507.15551 (ReLU routing, dense training and sparse inference); Fedus et al.,
Switch Transformers, arXiv 2101.03961 (load balance).

| word of `ffn` | y_t |
| --- | --- |
| `dense` | FFN_t(x_t) |
| `gated` | FFN_t(x_t * tanh(V_t GELU(U_t x_t))) |
| `smoe` | sum_e g_e FFN_{t,e}(x_t), g = softmax over the `top_k` best logits |
| `relu_moe` | sum_e ReLU(h(x_t))_e FFN_{t,e}(x_t) |

The hidden width of an expert is that of the dense network over the experts
that are meant to be active, so that the active size stays (our choice for
`relu_moe`).

**All experts are computed**, side by side as one wide network whose hidden
units are multiplied by the gates. With 4 experts of `base` size this was no
slower on a CPU than to sort the examples by expert and compute the chosen ones
alone; with 6, or wider ones, the sorting wins in training. The FLOPs executed,
which a compiler counts and `result.json` holds, are thus about `num_experts /
active` times those of the dense network. What the papers compare are the
*active* ones, 2 * `idle_params` less per example.

**Two paths.** How the routers of `relu_moe` share a training is not stated;
our choice: a training step sends every example through the network twice (see
`two_paths`), gated by `h_train`, which carries no penalty and so trains all
experts, and by `h_infer`, and adds both losses. What is served is trained as
it is served.

Losses and counters are sums over valid examples. Under `pmap` the active share
that steers the penalty and the shares of the load balance are the device's own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from recjax.errors import UserError
from recjax.layers.dropout import Dropout
from recjax.layers.per_token import KERNEL_INIT, PerTokenDense, PerTokenFFN
from recjax.losses import Terms

FFNS = ("dense", "gated", "smoe", "relu_moe")
EXPERT_INIT = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal", batch_axis=(0, 1)
)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Shape of the per-token networks that are not dense.

  Attributes:
    gate_dim: `gated`: inner width of the gate.
    num_experts: Experts of a token.
    top_k: `smoe`: experts that an example uses.
    balance_weight: `smoe`: factor of the load-balance loss of every router.
    activation_budget: `relu_moe`: share of the experts meant to be active.
    penalty_weight: `relu_moe`: factor of the sum of gates at the budget.
    penalty_rate: `relu_moe`: how fast the factor grows with the excess, as
      exp(rate * (active share - budget)).
  """

  gate_dim: int = 32
  num_experts: int = 4
  top_k: int = 2
  balance_weight: float = 0.01
  activation_budget: float = 0.5
  penalty_weight: float = 1e-3
  penalty_rate: float = 10.0

  def __post_init__(self):
    if self.gate_dim < 1:
      raise UserError(f"moe.gate_dim must be at least 1, got {self.gate_dim}")
    if not 1 <= self.top_k <= self.num_experts:
      raise UserError(
        f"moe.top_k ({self.top_k}) must be between 1 and moe.num_experts "
        f"({self.num_experts})"
      )
    if not 0 < self.activation_budget <= 1:
      raise UserError(
        "moe.activation_budget must lie in (0, 1], got "
        f"{self.activation_budget}"
      )
    for name in ("balance_weight", "penalty_weight", "penalty_rate"):
      if not 0 <= getattr(self, name) < math.inf:
        raise UserError(
          f"moe.{name} must be at least 0 and finite, got {getattr(self, name)}"
        )

  def active_experts(self, ffn: str) -> float:
    """Experts that an example is meant to use."""
    if ffn == "smoe":
      return float(self.top_k)
    return self.activation_budget * self.num_experts

  def expert_dim(self, ffn: str, dense_dim: int) -> int:
    """Hidden width of an expert beside a dense network of `dense_dim`."""
    return max(1, int(dense_dim / self.active_experts(ffn)))


class GatedPerTokenFFN(nn.Module):
  """`FFN_t(x_t * tanh(V_t GELU(U_t x_t)))`, a gate of low rank (ours: biases).

  Attributes:
    gate_dim: Inner width of the gate.
    mlp_ratio: Inner width of the network over the token's width.
    dropout_rate: Share of the network's inner units dropped in training.
    dtype: Type of the computation.
  """

  gate_dim: int
  mlp_ratio: float = 4.0
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "tokens batch dim"], *, train: bool
  ) -> Float[Array, "tokens batch dim"]:
    inner = PerTokenDense(self.gate_dim, self.dtype, name="gate_down")(x)
    gate = PerTokenDense(x.shape[-1], self.dtype, name="gate_up")(
      jax.nn.gelu(inner)
    )
    ffn = PerTokenFFN(self.mlp_ratio, self.dropout_rate, self.dtype, name="ffn")
    return ffn(x * jnp.tanh(gate), train=train)


class PerTokenSparseMoE(nn.Module):
  """`sum_e g_e FFN_{t,e}(x_t)`, g the softmax over the `top_k` best logits.

  Attributes:
    config: Experts and the weight of their load balance.
    mlp_ratio: Inner width of the dense network it stands for.
    dropout_rate: Share of hidden units dropped in training.
    dtype: Type of the experts; the router is float32.
  """

  config: MoEConfig
  mlp_ratio: float = 4.0
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "tokens batch dim"],
    example_mask: Bool[Array, " batch"],
    *,
    train: bool,
  ) -> tuple[Float[Array, "tokens batch dim"], Terms, dict[str, Array]]:
    """Routes and mixes.

    Args:
      x: Tokens of the examples.
      example_mask: False for padding, which counts nowhere.
      train: Whether dropout is on.

    Returns:
      The mixture, the term `moe_balance`, and counters for `expert_usage`.
    """
    config = self.config
    logits = PerTokenDense(config.num_experts, jnp.float32, name="router")(x)
    gates, chosen = top_k_gates(logits, config.top_k)
    hidden_dim = config.expert_dim("smoe", int(self.mlp_ratio * x.shape[-1]))
    y = PerTokenExperts(
      config.num_experts,
      hidden_dim,
      self.dropout_rate,
      self.dtype,
      name="experts",
    )(x, gates, train=train)
    counters = _count(chosen, example_mask)
    number = counters["examples"]
    probs = _count(jax.nn.softmax(logits), example_mask)["active"]
    balance = load_balance(
      counters["active"] / (config.top_k * jnp.maximum(number, 1.0)),
      probs / jnp.maximum(number, 1.0),
    ).sum()
    total = config.balance_weight * balance * number
    return y, {"moe_balance": (total, number)}, counters


class PerTokenReLUMoE(nn.Module):
  """`sum_e ReLU(h(x_t))_e FFN_{t,e}(x_t)` with routers to train and to serve.

  `h(s) = W s + b`, b from 1, so that most experts are active at first (our
  choice). The penalty is `lambda sum_{t,e} ReLU(h_infer(x_t))_e`; without a
  state to steer it by, `lambda = penalty_weight * exp(penalty_rate * (active
  share of the batch - activation_budget))` without a gradient (our choice).

  Attributes:
    config: Experts, their budget and its penalty.
    mlp_ratio: Inner width of the dense network it stands for.
    dropout_rate: Share of hidden units dropped in training.
    dtype: Type of the experts; the routers are float32.
  """

  config: MoEConfig
  mlp_ratio: float = 4.0
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "tokens batch dim"],
    example_mask: Bool[Array, " batch"],
    *,
    train: bool,
  ) -> tuple[Float[Array, "tokens batch dim"], Terms, dict[str, Array]]:
    """Gates and mixes.

    Args:
      x: Tokens of the examples; in training the result of `two_paths`.
      example_mask: False for padding, which counts nowhere; as long as `x`.
      train: Whether there are two paths, and dropout is on.

    Returns:
      The mixture, the term `moe_penalty` (none outside a training step), and
      counters for `expert_usage`.
    """
    config = self.config
    h_train = ReLURouter(config.num_experts, name="h_train")
    h_infer = ReLURouter(config.num_experts, name="h_infer")
    if train:
      x_served, x_dense = split_paths(x, axis=1)
      example_mask, _ = split_paths(example_mask)
      served = h_infer(x_served)
      gates = join_paths(served, h_train(x_dense), axis=1)
    else:
      gates = served = h_infer(x)
      if self.is_mutable_collection("params"):
        h_train(x)  # Declares its parameters.
    hidden_dim = config.expert_dim(
      "relu_moe", int(self.mlp_ratio * x.shape[-1])
    )
    y = PerTokenExperts(
      config.num_experts,
      hidden_dim,
      self.dropout_rate,
      self.dtype,
      name="experts",
    )(x, gates, train=train)
    counters = _count(served > 0, example_mask)
    if not train:
      return y, {}, counters
    factor = penalty_factor(counters, config)
    total = jnp.sum(jnp.where(example_mask[None, :, None], served, 0.0))
    return y, {"moe_penalty": (factor * total, counters["examples"])}, counters


class PerTokenExperts(nn.Module):
  """`sum_e g_e (W2_{t,e} GELU(W1_{t,e} x_t + b1_{t,e}) + b2_{t,e})`, all of e.

  Attributes:
    num_experts: Experts of a token.
    hidden_dim: Inner width of one.
    dropout_rate: Share of inner units dropped in training.
    dtype: Type of the computation.
  """

  num_experts: int
  hidden_dim: int
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "tokens batch dim"],
    gates: Float[Array, "tokens batch experts"],
    *,
    train: bool,
  ) -> Float[Array, "tokens batch dim"]:
    tokens, batch, dim = x.shape
    experts, inner = self.num_experts, self.hidden_dim
    hidden = PerTokenDense(experts * inner, self.dtype, name="up")(x)
    hidden = jax.nn.gelu(hidden)
    hidden = Dropout(self.dropout_rate, deterministic=not train)(hidden)
    kernel = self.param("down", EXPERT_INIT, (tokens, experts, inner, dim))
    bias = self.param(
      "down_bias", nn.initializers.zeros, (tokens, experts, dim)
    )
    gates, kernel, bias = nn.dtypes.promote_dtype(
      gates, kernel, bias, dtype=self.dtype
    )
    # The gates act on the hidden units, so that one product adds the experts.
    gated = hidden.reshape(tokens, batch, experts, inner) * gates[..., None]
    y = jnp.einsum(
      "tbh,thd->tbd",
      gated.reshape(tokens, batch, -1),
      kernel.reshape(tokens, -1, dim),
    )
    return y + jnp.einsum("tbe,ted->tbd", gates, bias)


class ReLURouter(nn.Module):
  """`ReLU(W_t x_t + b_t)` in float32, b from 1.

  Attributes:
    num_experts: Gates of a token.
  """

  num_experts: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "tokens batch dim"]
  ) -> Float[Array, "tokens batch experts"]:
    tokens, _, dim = x.shape
    shape = (tokens, dim, self.num_experts)
    kernel = self.param("kernel", KERNEL_INIT, shape)
    bias = self.param(
      "bias", nn.initializers.ones, (tokens, 1, self.num_experts)
    )
    x = x.astype(jnp.float32)
    return jax.nn.relu(jnp.einsum("tbi,tie->tbe", x, kernel) + bias)


def apply_ffn(
  ffn: str,
  config: MoEConfig,
  x: Float[Array, "tokens batch dim"],
  example_mask: Bool[Array, " batch"],
  *,
  mlp_ratio: float,
  dropout_rate: float,
  dtype: jax.typing.DTypeLike,
  train: bool,
  name: str,
) -> tuple[Float[Array, "tokens batch dim"], Terms, dict[str, Array]]:
  """The per-token network `ffn`, as a part `name` of the calling module.

  Args:
    ffn: One of `FFNS`.
    config: Shape of the gate and the experts.
    x: Tokens; in training with `relu_moe` the result of `two_paths`.
    example_mask: False for padding; as long as `x`.
    mlp_ratio: Inner width of the dense network over the token's width.
    dropout_rate: Share of inner units dropped in training.
    dtype: Type of the computation.
    train: Whether dropout and the losses of training are on.
    name: Name of the part.

  Returns:
    Its output, loss terms beside those of the tasks, and counters for
    `expert_usage`; both empty for a network without experts.
  """
  shape = (mlp_ratio, dropout_rate, dtype)
  if ffn == "smoe":
    moe = PerTokenSparseMoE(config, *shape, name=name)
    return moe(x, example_mask, train=train)
  if ffn == "relu_moe":
    moe = PerTokenReLUMoE(config, *shape, name=name)
    return moe(x, example_mask, train=train)
  if ffn == "gated":
    gated = GatedPerTokenFFN(config.gate_dim, *shape, name=name)
    return gated(x, train=train), {}, {}
  return PerTokenFFN(*shape, name=name)(x, train=train), {}, {}


def two_paths(
  x: Shaped[Array, "*shape"], axis: int = 0
) -> Shaped[Array, "..."]:
  """Every example twice: for the served path and for the dense one."""
  return join_paths(x, x, axis)


def join_paths(
  served: Shaped[Array, "*shape"], dense: Shaped[Array, "*shape"], axis: int = 0
) -> Shaped[Array, "..."]:
  """The two paths of an example side by side along the batch axis.

  So a batch that is cut over devices stays where it is.
  """
  shape = list(served.shape)
  shape[axis] *= 2
  return jnp.stack([served, dense], axis=axis + 1).reshape(shape)


def split_paths(
  x: Shaped[Array, "*shape"], axis: int = 0
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
  """The served and the dense path; undoes `join_paths`."""
  shape = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
  pairs = x.reshape(shape)
  served, dense = (jnp.take(pairs, i, axis=axis + 1) for i in (0, 1))
  return served, dense


def top_k_gates(
  logits: Float[Array, "*shape experts"], top_k: int
) -> tuple[Float[Array, "*shape experts"], Float[Array, "*shape experts"]]:
  """Softmax over the `top_k` largest logits, zero elsewhere; and which (0, 1).

  Of equal logits the first are chosen.
  """
  _, best = jax.lax.top_k(logits, top_k)
  chosen = jax.nn.one_hot(best, logits.shape[-1]).sum(axis=-2)
  return jax.nn.softmax(logits, where=chosen > 0), chosen


def load_balance(
  routed: Float[Array, "*shape experts"], probs: Float[Array, "*shape experts"]
) -> Float[Array, "*shape"]:
  """`E sum_e f_e p_e`: 1 if even, E if one expert takes all.

  Args:
    routed: f, share of the routed examples of each expert; sums to 1.
    probs: p, mean probability of each expert, of the softmax over all logits
      (so that experts not chosen have a gradient too); sums to 1.
  """
  return routed.shape[-1] * jnp.sum(routed * probs, axis=-1)


def penalty_factor(
  counters: Mapping[str, Array], config: MoEConfig
) -> Float[Array, ""]:
  """lambda, from the active share that the counters of a batch tell."""
  pairs = counters["active"].size * jnp.maximum(counters["examples"], 1.0)
  excess = counters["active"].sum() / pairs - config.activation_budget
  factor = config.penalty_weight * jnp.exp(config.penalty_rate * excess)
  return jax.lax.stop_gradient(factor)


def add_terms(terms: Terms, more: Terms) -> Terms:
  """Sums of equally weighted terms by name."""
  total = dict(terms)
  for name, (value, weight) in more.items():
    before = total[name][0] if name in total else 0.0
    total[name] = (before + value, weight)
  return total


def idle_params(
  ffn: str,
  config: MoEConfig,
  *,
  num_tokens: int,
  token_dim: int,
  mlp_ratio: float,
) -> int:
  """Parameters of one such network that a served example does not use.

  Those of the experts not active (for `relu_moe`: at the budget) and of
  `h_train`. Each costs a multiply-add that is executed and not active.
  """
  if ffn not in ("smoe", "relu_moe"):
    return 0
  hidden = config.expert_dim(ffn, int(mlp_ratio * token_dim))
  expert = 2 * token_dim * hidden + hidden + token_dim
  idle = (config.num_experts - config.active_experts(ffn)) * expert
  if ffn == "relu_moe":
    idle += (token_dim + 1) * config.num_experts
  return round(num_tokens * idle)


def expert_usage(counters: Mapping[str, Any]) -> dict[str, float]:
  """Numbers that tell an even use of experts from a collapse.

  Args:
    counters: Added counters of one network.

  Returns:
    `active_share`: mean share of the experts that an example uses.
    `perplexity`: exp(entropy of the load) over the experts, the mean over
    tokens; 1 if even. `unused_experts`: share of experts never used.
  """
  active = np.asarray(counters["active"], np.float64)
  load = active / np.maximum(active.sum(axis=-1, keepdims=True), 1.0)
  entropy = -(load * np.log(np.where(load > 0, load, 1.0))).sum(axis=-1)
  examples = max(float(counters["examples"]), 1.0)
  return {
    "active_share": float(active.mean()) / examples,
    "perplexity": float(np.exp(entropy).mean()) / active.shape[-1],
    "unused_experts": float((active == 0).mean()),
  }


def _count(
  active: Shaped[Array, "tokens batch experts"],
  example_mask: Bool[Array, " batch"],
) -> dict[str, Array]:
  """Uses of every expert by valid examples, and the number of these."""
  counted = jnp.where(example_mask[None, :, None], active, 0)
  return {
    "active": counted.astype(jnp.float32).sum(axis=1),
    "examples": example_mask.astype(jnp.float32).sum(),
  }
