r"""Measures what the slots of a memory cost: retrieval, training step, bytes.

    python -m experiments.bench_memory [--num_keys=64,128,256,512,1024,2048]

Trains MSN with one memory of `num_keys ** 2` slots of 256 numbers for every
size in turns in one process, so that a busy machine slows all alike. Prints a
line a size and the exponents `e` of cost ~ slots ** e, fitted over the sizes
with a 95 % interval, and the same as JSON. Exits with code 1 if the operations
of a retrieval do not grow as the square root of the slots, or the lower end of
the interval of its time lies above 0.5. All sizes together need 12 GB.

    python -m experiments.bench_memory --num_keys=2048

trains a memory of 1.07 billion parameters alone and prints the peak of the
process's resident memory, its making included.
"""

import functools
import json
import resource
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import flags

import pallas_kernels
from experiments import bench_data, door
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import run_files, train_state
from recjax.errors import UserError
from recjax.layers import product_key_memory
from recjax.layers.product_key_memory import MemoryConfig

_NUM_KEYS = flags.DEFINE_list(
  "num_keys", ["64", "128", "256", "512", "1024", "2048"], "Keys per axis."
)
_TOKEN_DIM = flags.DEFINE_integer("token_dim", 256, "Width of a slot's value.")
_KEY_DIM = flags.DEFINE_integer("key_dim", 64, "Width of a sub-key.")
_TOP_K = flags.DEFINE_integer("top_k", 32, "Slots that a token reads.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "Examples a step.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed steps of each size.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters and batches.")

NUM_TOKENS = 8
MAX_EXPONENT = 0.5
_NUM_ROWS = 10_000


def main(argv) -> None:
  """Runs the benchmark."""
  del argv
  try:
    sizes = sorted({int(size) for size in _NUM_KEYS.value})
  except ValueError:
    sizes = []
  if not sizes or sizes[0] < _TOP_K.value:
    raise UserError(
      f"--num_keys must be whole numbers of at least --top_k ({_TOP_K.value}),"
      f" got {','.join(_NUM_KEYS.value)}; write for example --num_keys=64,128"
    )
  memories = [Memory(size) for size in sizes]
  for i in range(_REPEATS.value + 1):
    # The order turns, so that no size always follows the same other.
    for memory in memories[:: 1 if i % 2 else -1]:
      memory.run()
  rows = [memory.summary() for memory in memories]
  print(
    f"{'slots':>10}{'total':>9}{'active':>9}{'values':>10}{'retrieval':>22}"
    f"{'step':>10}"
  )
  for row in rows:
    print(
      f"{row['num_slots']:>10,}{row['params_total'] / 1e6:>8.1f}M"
      f"{row['params_active'] / 1e6:>8.2f}M"
      f"{row['values_bytes'] / 2**20:>7.0f} MB"
      f"{row['retrieval_flops']:>9.0f} FLOPs"
      f"{1e3 * row['retrieval_secs']:>5.1f} ms{1e3 * row['step_secs']:>7.0f} ms"
    )
  exponents = {}
  if len(sizes) > 2:
    for name in ("retrieval_flops", "retrieval_secs", "step_secs"):
      exponents[name] = fit_exponent(
        [row["num_slots"] for row in rows], [row[name] for row in rows]
      )
      value, low, high = exponents[name]
      print(f"{name} ~ slots ** {value:.2f} (95 %: {low:.2f} ... {high:.2f})")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(f"peak resident memory: {peak / 1e9:.1f} GB")
  print(
    json.dumps(
      {
        "sizes": rows,
        "exponents": exponents,
        "peak_bytes": peak,
        "batch_size": _BATCH_SIZE.value,
        "repeats": _REPEATS.value,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
      }
    )
  )
  if exponents:
    flops, secs = exponents["retrieval_flops"], exponents["retrieval_secs"]
    sys.exit(int(flops[0] > MAX_EXPONENT or secs[1] > MAX_EXPONENT))


class Memory:
  """MSN with one memory: its training step and its retrieval alone."""

  def __init__(self, num_keys: int):
    self.config = MemoryConfig(
      num_keys=num_keys, key_dim=_KEY_DIM.value, top_k=_TOP_K.value
    )
    schema = bench_data.make_schema(_NUM_ROWS)
    model = dict(
      num_tokens=NUM_TOKENS,
      token_dim=_TOKEN_DIM.value,
      num_layers=1,
      memory_layers=(0,),
      memory=vars(self.config),
    )
    self.method = method_lib.load("msn", model, schema)
    config = train_state.StepConfig(
      self.method,
      self.method.stages[0],
      optimizer_lib.Config(),
      num_steps=_REPEATS.value + 1,
    )
    rng = np.random.default_rng(_SEED.value)
    self.batch = bench_data.make_batch(rng, schema, _BATCH_SIZE.value)
    init = functools.partial(train_state.init_state, config=config)
    self.state = jax.jit(init)(jax.random.key(_SEED.value))
    self.step = jax.jit(
      functools.partial(train_state.train_step, config=config),
      donate_argnums=0,
    )
    self.queries = jnp.asarray(
      rng.standard_normal(
        (NUM_TOKENS, _BATCH_SIZE.value, 2, 1, _KEY_DIM.value), np.float32
      )
    )
    self.keys = jnp.asarray(
      rng.standard_normal((2, 1, num_keys, _KEY_DIM.value), np.float32)
    )
    self.retrieve = jax.jit(functools.partial(retrieve, top_k=_TOP_K.value))
    self.step_secs, self.retrieval_secs = [], []

  def run(self) -> None:
    """Times one retrieval and one step; the first of each compiles."""
    start = time.perf_counter()
    jax.block_until_ready(self.retrieve(self.queries, self.keys))
    self.retrieval_secs.append(time.perf_counter() - start)
    start = time.perf_counter()
    self.state, scalars = jax.block_until_ready(
      self.step(self.state, self.batch)
    )
    self.step_secs.append(time.perf_counter() - start)
    if not np.isfinite(float(scalars["loss"][0])):
      raise RuntimeError(f"loss {scalars['loss'][0]}")

  def summary(self) -> dict[str, Any]:
    """What it holds and what it took."""
    params = run_files.count_params(self.method)
    # A kernel does not say what it computes.
    with pallas_kernels.use("xla"):
      cost = (
        jax.jit(functools.partial(retrieve, top_k=_TOP_K.value))
        .lower(self.queries, self.keys)
        .cost_analysis()
      )
    num_queries = NUM_TOKENS * _BATCH_SIZE.value
    return {
      "num_slots": self.config.num_slots,
      "params_total": params["dense"] + params["sparse"],
      "params_active": params["active"],
      "values_bytes": self.state.tables["memory_0/values"].nbytes,
      "retrieval_flops": cost["flops"] / num_queries,
      "retrieval_secs": statistics.median(self.retrieval_secs[1:]),
      "step_secs": statistics.median(self.step_secs[1:]),
    }


def retrieve(queries, keys, *, top_k: int):
  """Weights and slots of every token, as `ProductKeyMemory` finds them."""
  gain = jnp.full(keys.shape[-1:], keys.shape[-1] ** -0.25)
  keys = product_key_memory.layer_norm(keys, gain)
  return pallas_kernels.product_key_lookup(
    queries, keys, top_k, gain=jnp.stack([gain, gain])
  )


def fit_exponent(sizes, costs) -> tuple[float, float, float]:
  """Slope of log cost over log size by least squares, and its 95 % interval."""
  fit = scipy.stats.linregress(np.log(sizes), np.log(costs))
  half = scipy.stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
  return fit.slope, fit.slope - half, fit.slope + half


if __name__ == "__main__":
  door.run(main)
