"""The encoder of texts against loops in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.layers.text_encoder import EncoderConfig, TextEncoder

CONFIG = EncoderConfig(dim=6, num_heads=3, mlp_dim=5)
VOCAB, BATCH, LENGTHS = 11, 4, (3, 5)


def make_inputs(num_fields, rng):
  tokens = [rng.integers(1, VOCAB, (BATCH, n)) for n in LENGTHS[:num_fields]]
  masks = [
    np.arange(n)[None] < rng.integers(0, n + 1, (BATCH, 1))
    for n in LENGTHS[:num_fields]
  ]
  masks[0][0], masks[-1][1] = False, True  # A text without words, a full one.
  return tokens, masks


def random_params(encoder, embedding, tokens, masks, rng):
  shapes = jax.eval_shape(
    encoder.init, jax.random.key(0), embedding, tokens, masks
  )
  return jax.tree.map(lambda x: rng.normal(0, 0.6, x.shape), shapes)["params"]


def norm(x, params):
  mean = sum(x) / len(x)
  variance = sum((x - mean) ** 2) / len(x)
  return (x - mean) / math.sqrt(variance + 1e-6) * params["scale"] + params[
    "bias"
  ]


def dense(x, params):
  return x @ params["kernel"] + params["bias"]


def gelu(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def stream(params, embedding, tokens, masks):
  """The embedded positions of one text, and which of them are valid."""
  parts, valid = [params["cls"][0, 0] + params["type"][0]], [True]
  for i, (field, mask) in enumerate(zip(tokens, masks, strict=True)):
    if i:
      parts.append(params["sep"][0, 0] + params["type"][i - 1])
      valid.append(True)
    for token, ok in zip(field, mask, strict=True):
      parts.append(embedding[token] + params["type"][i])
      valid.append(bool(ok))
  return [x + params["position"][0, i] for i, x in enumerate(parts)], valid


def layer(params, xs, valid):
  """One Transformer layer, position by position and head by head."""
  width = CONFIG.dim // CONFIG.num_heads
  normed = [norm(x, params["attention_norm"]) for x in xs]
  query, key, value = (
    [dense(y, params[name]) for y in normed]
    for name in ("query", "key", "value")
  )
  out = []
  for i, x in enumerate(xs):
    attended = np.zeros(CONFIG.dim)
    for head in range(CONFIG.num_heads):
      part = slice(head * width, (head + 1) * width)
      scores = [
        math.exp(query[i][part] @ key[j][part] / math.sqrt(width))
        if valid[j]
        else 0.0
        for j in range(len(xs))
      ]
      for j, score in enumerate(scores):
        attended[part] += score / sum(scores) * value[j][part]
    y = x + dense(attended, params["out"])
    hidden = gelu(dense(norm(y, params["ffn_norm"]), params["up"]))
    out.append(y + dense(hidden, params["down"]))
  return out


class TextEncoderTest(parameterized.TestCase):
  @parameterized.parameters((1, 1), (2, 2))
  def test_equals_loops_in_float64(self, num_fields, num_layers):
    rng = np.random.default_rng(num_fields)
    embedding = rng.normal(size=(VOCAB, CONFIG.dim))
    tokens, masks = make_inputs(num_fields, rng)
    encoder = TextEncoder(CONFIG, num_layers)
    single = lambda tree: jax.tree.map(  # noqa: E731
      lambda x: jnp.asarray(x, jnp.float32), tree
    )
    arrays = (
      [jnp.asarray(t, jnp.int32) for t in tokens],
      [jnp.asarray(m) for m in masks],
    )
    params = random_params(encoder, single(embedding), *arrays, rng)
    actual = jax.jit(encoder.apply)(
      {"params": single(params)}, single(embedding), *arrays
    )
    for row in range(BATCH):
      xs, valid = stream(
        params, embedding, [t[row] for t in tokens], [m[row] for m in masks]
      )
      for i in range(num_layers):
        xs = layer(params[f"layer_{i}"], xs, valid)
      expected = norm(xs[0], params["norm"])
      np.testing.assert_allclose(actual[row], expected, rtol=2e-4, atol=2e-5)


if __name__ == "__main__":
  absltest.main()
