"""The equations of the layers once more, in float64 NumPy and plain loops."""

import itertools

import jax
import numpy as np


def to_float64(tree):
  """All arrays of a pytree as float64 NumPy."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def random_variables(method, seed=0):
  """Parameters and tables of the right shapes, far from their initial values.

  Gains and scales lie around 1, everything else around 0.
  """
  rng = np.random.default_rng(seed)
  shapes, tables = jax.eval_shape(method.init, jax.random.key(0))

  def draw(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    centre = float(name == "scale" or name.endswith("gain"))
    value = centre + 0.4 * rng.normal(size=leaf.shape)
    return jax.numpy.asarray(value, leaf.dtype)

  draw_all = jax.tree_util.tree_map_with_path
  return draw_all(draw, shapes), draw_all(draw, tables)


def layer_norm(x, gain, bias=0.0, eps=1e-6):
  """Normalises the last axis."""
  centred = x - x.mean(-1, keepdims=True)
  return (
    centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * (gain)
    + bias
  )


def gelu(x):
  """The tanh form of GELU."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
  """Over a vector."""
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def sigmoid(x):
  """1 / (1 + exp(-x))."""
  return 1 / (1 + np.exp(-x))


def token_mixing(x):
  """Mixed token h is the concatenation over t of head h of token t."""
  tokens, batch, dim = x.shape
  width = dim // tokens
  mixed = np.zeros_like(x)
  for h, b, t in itertools.product(range(tokens), range(batch), range(tokens)):
    mixed[h, b, t * width : (t + 1) * width] = x[
      t, b, h * width : (h + 1) * width
    ]
  return mixed


def per_token_dense(params, x):
  """`x_t W_t + b_t`, one token after the other."""
  return np.stack(
    [x[t] @ params["kernel"][t] + params["bias"][t, 0] for t in range(len(x))]
  )


def per_token_ffn(params, x):
  """`W2_t GELU(W1_t x_t + b1_t) + b2_t`."""
  hidden = gelu(per_token_dense(params["up"], x))
  return per_token_dense(params["down"], hidden)


def gated_ffn(params, x):
  """`FFN_t(x_t * tanh(V_t GELU(U_t x_t)))`."""
  inner = gelu(per_token_dense(params["gate_down"], x))
  gate = np.tanh(per_token_dense(params["gate_up"], inner))
  return per_token_ffn(params["ffn"], x * gate)


def experts(params, x, gates):
  """`sum_e g_e FFN_{t,e}(x_t)`, one token, example and expert at a time."""
  up, bias = params["up"]["kernel"], params["up"]["bias"]
  output = np.zeros_like(x)
  for t, b, e in np.ndindex(gates.shape):
    down = params["down"][t, e]
    part = slice(e * len(down), (e + 1) * len(down))
    hidden = gelu(x[t, b] @ up[t][:, part] + bias[t, 0, part])
    output[t, b] += gates[t, b, e] * (hidden @ down + params["down_bias"][t, e])
  return output


def top_k_gates(logits, top_k):
  """Softmax over the `top_k` best of the last axis; zero elsewhere."""
  gates = np.zeros_like(logits)
  for index in np.ndindex(logits.shape[:-1]):
    best = np.argsort(-logits[index], kind="stable")[:top_k]
    gates[index][best] = softmax(logits[index][best])
  return gates


def relu_gates(params, x):
  """`ReLU(W_t x_t + b_t)`."""
  return np.maximum(per_token_dense(params, x), 0)


def per_token_network(params, x, ffn, moe):
  """The network of a served example that the words `ffn` and `moe` name."""
  if ffn == "gated":
    return gated_ffn(params, x)
  if ffn == "smoe":
    logits = per_token_dense(params["router"], x)
    return experts(params["experts"], x, top_k_gates(logits, moe.top_k))
  if ffn == "relu_moe":
    return experts(params["experts"], x, relu_gates(params["h_infer"], x))
  return per_token_ffn(params, x)


def memory(params, values, x, config):
  """Product-key memory that looks at every one of the slots.

  Returns:
    v_o `[tokens, batch, dim]`, and the weight of every slot
    `[tokens or 1, batch, heads, slots]`.
  """
  source = x
  if config.query_scope == "per_sample":
    source = x.mean(0, keepdims=True)
  searches, batch, _ = source.shape
  shape = (searches, batch, config.num_heads, config.num_slots)
  weights = np.zeros(shape)
  for t, b, h in np.ndindex(*shape[:3]):
    row, col = sub_scores(params, source[t, b], t, h, config)
    scores = (row[:, None] + col).ravel()
    best = np.argsort(-scores)[: config.top_k]
    weights[t, b, h, best] = softmax(scores[best])
  output = np.zeros((len(x), batch, values.shape[-1]))
  for t, b, h in np.ndindex(len(x), batch, config.num_heads):
    first = t * config.num_slots if config.value_scope == "per_token" else 0
    table = values[first : first + config.num_slots]
    output[t, b] += weights[min(t, searches - 1), b, h] @ table
  return output, weights


def sub_scores(params, x, token, head, config):
  """Scores of all sub-keys of both axes for one search."""
  query = _query(params, x, token, config)[:, head]
  return tuple(
    _keys(params, name, head, config)
    @ _norm(params, f"{name}_query", q, config)
    for name, q in zip(("row", "col"), query, strict=True)
  )


def gate(x, value, kind):
  """What the memory's value does to `x`."""
  return (
    x
    * {
      "tanh": np.tanh(value),
      "none": value,
      "sigmoid": sigmoid(value),
      "one_plus_tanh": 1 + np.tanh(value),
    }[kind]
  )


def concat_features(schema, batch, rows, params=None):
  """Ids (lists by their mean), vectors, numbers, hinges of the numbers."""
  examples = []
  for b in range(batch.size):
    parts = []
    for feature in schema.id_features:
      values = rows[feature.name][b]
      if feature.is_list:
        valid = values[np.asarray(batch.id_mask[feature.name][b])]
        values = valid.mean(0) if len(valid) else np.zeros(values.shape[-1])
      parts.append(values)
    parts += [
      np.asarray(batch.vectors[f.name][b]) for f in schema.vector_features
    ]
    dense = np.asarray(batch.dense[b], np.float64)
    parts.append(dense)
    if params is not None:
      for i, number in enumerate(dense):
        line = number * params["slope"][i] + params["knots"][i]
        parts.append(np.maximum(line, 0))
    examples.append(np.concatenate(parts))
  return np.stack(examples)


def feature_rows(table, values, batch):
  """Feature name -> embedding of every id (masked ones included)."""
  return {
    name: values[np.asarray(batch.ids[name]) + first]
    for name, first in table.first_row.items()
  }


def feature_tokens(params, inputs, num_tokens):
  """Slices of equal width, the last padded with zeros, each projected."""
  width = int(np.ceil(inputs.shape[-1] / num_tokens))
  tokens = np.zeros((num_tokens, len(inputs), width))
  for t in range(num_tokens):
    part = inputs[:, t * width : (t + 1) * width]
    tokens[t, :, : part.shape[-1]] = part
  return per_token_dense(params["project"], tokens)


def _query(params, x, token, config):
  kernel, bias = params["query"]["kernel"], params["query"]["bias"]
  if not config.shared_query:
    kernel, bias = kernel[token], bias[token, 0]
  return (x @ kernel + bias).reshape(2, config.num_heads, config.key_dim)


def _keys(params, name, head, config):
  keys = params[f"{name}_keys"][head]
  if config.use_over_parameterization:
    theta = params[f"{name}_theta"][head]
    keys = keys @ theta if config.theta_side == "right" else theta @ keys
  return _norm(params, f"{name}_key", keys, config)


def _norm(params, name, x, config):
  if not config.use_layer_norm:
    return x
  return layer_norm(x, params[f"{name}_gain"])
