"""Where a model's work and its parameters are, counted without a compiler.

`count_flops(method)` walks the operations of the forward pass, with their
shapes, and adds up by the same conventions as XLA's cost analysis of the
unoptimised program, which is what `recjax.run_files.count_flops` records in
`result.json`. The two agree (a test compares them for every model), but this
one also says which Linen module the work is in, and works where a backend
has no cost analysis.

| operation | counted |
| --- | --- |
| matrix product | 2 per multiply-add |
| elementwise, also comparisons, selections and conversions | 1 an element |
| integer power | its multiplications, by repeated squaring |
| exp, log, tanh, sqrt, power and the like | 1 transcendental an element |
| logistic | 3, and 1 transcendental, an element |
| reduction to one of n | n - 1 |
| sort of n elements in all | n ceil(log2 n) |
| scatter of an operation | 1 an element of the updates |
| top-k, gather, reshaping, copying | 0; clipping and filling as elementwise |
| scan | its body, times its length |
| while | its body once: how often it runs is not known |
| cond | its most expensive branch |

Transcendentals are no FLOPs, here as there, and work whose result is not used
is not counted.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core
from jax.lax import GatherScatterMode

import pallas_kernels
from recjax.method import Method, empty_batch

READS = "reads"  # What is outside the model: the reading of embedding rows.


@dataclasses.dataclass(frozen=True)
class Flops:
  """Operations of one example's forward pass.

  Attributes:
    total: All but the transcendental ones, 2 per multiply-add.
    transcendentals: Evaluations of exp, tanh, rsqrt and the like.
    by_module: Path of a Linen module, such as `Model/tokens/project`, -> its
      own part of `total`, the parts of its submodules left out; `READS` for
      what is done before the model.
  """

  total: float
  transcendentals: float
  by_module: dict[str, float]

  def under(self, path: str) -> float:
    """The part of `total` in the module `path` and all its submodules."""
    return sum(
      flops
      for name, flops in self.by_module.items()
      if name == path or name.startswith(f"{path}/")
    )


def count_flops(method: Method, batch_size: int = 64) -> Flops:
  """Operations of one example's forward pass, by module.

  Args:
    method: A method bound to its config and data.
    batch_size: Of the pass that is counted; what does not depend on the
      examples, such as a memory's effective keys, is shared by so many.

  Raises:
    NotImplementedError: If the model uses an operation that is not known here.

  Example:
    >>> flops = count_flops(method)                     # doctest: +SKIP
    >>> flops.under("Model/memory_0") / flops.total     # doctest: +SKIP
    0.17
  """
  params, tables = jax.eval_shape(method.init, jax.random.key(0))
  batch = jax.eval_shape(
    lambda: empty_batch(method.schema, method.tasks, batch_size)
  )

  def run(params, tables, batch):
    # A kernel does not say what it computes.
    with pallas_kernels.use("xla"):
      rows = method.read(tables, batch)
      return method.apply(params, tables, rows, batch, train=False)[0]

  flops, transcendentals = count_jaxpr(
    jax.make_jaxpr(run)(params, tables, batch).jaxpr
  )
  return Flops(
    total=sum(flops.values()) / batch_size,
    transcendentals=sum(transcendentals.values()) / batch_size,
    by_module={name: n / batch_size for name, n in flops.items() if n},
  )


def count_params(method: Method) -> dict[str, int]:
  """Trained numbers by Linen module and by table.

  Returns:
    Path of a module such as `Model/tokens/project` -> its own parameters,
    those of its submodules left out; name of a table -> its entries. Their
    sum is `dense` plus `sparse` of `recjax.run_files.count_params`. The paths
    are those of the work but where modules share a scope (`nn.share_scope`).

  Example:
    >>> count_params(method)["embedding"]               # doctest: +SKIP
    1600
  """
  params, _ = jax.eval_shape(method.init, jax.random.key(0))
  counts = Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    counts["/".join(["Model", *(key.key for key in path[:-1])])] += leaf.size
  tables = {
    n: t.num_rows * t.dim for n, t in method.tables.items() if t.trained
  }
  return {**counts, **tables}


def count_jaxpr(
  jaxpr: core.Jaxpr, prefix: str = ""
) -> tuple[dict[str, int], dict[str, int]]:
  """FLOPs and transcendentals of a jaxpr, by module; see the module's table.

  Args:
    jaxpr: What `jax.make_jaxpr(f)(...).jaxpr` returns.
    prefix: Name stack of the operation that holds the jaxpr.

  Raises:
    NotImplementedError: If an operation is not known here.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 3))
    >>> count_jaxpr(jax.make_jaxpr(lambda x: x @ x.T)(x).jaxpr)[0]
    {'reads': 24}
  """
  flops, transcendentals = Counter(), Counter()
  for eqn in _used(jaxpr):
    stack = "/".join(filter(None, (prefix, str(eqn.source_info.name_stack))))
    if (inner := _inner(eqn, stack)) is not None:
      for total, part in zip((flops, transcendentals), inner, strict=True):
        total.update(part)
    else:
      module = _module(stack)
      own = _count(eqn)
      flops[module] += own[0]
      transcendentals[module] += own[1]
  return dict(flops), dict(transcendentals)


def _used(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
  """The operations that a result depends on."""
  live = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
  used = []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or any(v in live for v in eqn.outvars):
      used.append(eqn)
      live.update(v for v in eqn.invars if isinstance(v, core.Var))
  return used[::-1]


def _module(stack: str) -> str:
  """Path of the Linen module in a name stack, without methods and einsums."""
  path = []
  for part in stack.split("/"):
    # Of a method other than `__call__`: `module.method`, which may stand below
    # the module itself.
    name, _, method = part.partition(".")
    if "->" in part or "(" in part or (method and path[-1:] == [name]):
      continue
    path.append(name)
  return "/".join(filter(None, path)) or READS


def _inner(eqn: core.JaxprEqn, stack: str):
  """The counts of an operation that holds others, else None."""
  name = eqn.primitive.name
  if name == "cond":
    counts = [count_jaxpr(b.jaxpr, stack) for b in eqn.params["branches"]]
    return max(counts, key=lambda count: sum(count[0].values()))
  if name == "while":
    return _add(
      count_jaxpr(eqn.params[key].jaxpr, stack)
      for key in ("body_jaxpr", "cond_jaxpr")
    )
  inner = next(
    (eqn.params[name] for name in _INNER if name in eqn.params), None
  )
  if inner is None or name not in _CALLS:
    return None
  counts = count_jaxpr(getattr(inner, "jaxpr", inner), stack)
  times = eqn.params["length"] if name == "scan" else 1
  return tuple({k: times * n for k, n in part.items()} for part in counts)


def _add(counts: Iterator[tuple[dict[str, int], dict[str, int]]]):
  flops, transcendentals = Counter(), Counter()
  for part in counts:
    flops.update(part[0])
    transcendentals.update(part[1])
  return flops, transcendentals


# Where an operation holds the operations that it is made of.
_INNER = ("jaxpr", "call_jaxpr", "call")
_CALLS = frozenset(
  "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call "
  "custom_vjp_call custom_vmap_call custom_lin scan".split()
)
_FREE = frozenset(
  "broadcast_in_dim concatenate copy copy_p device_put dynamic_slice "
  "dynamic_update_slice expand_dims iota optimization_barrier pad reshape rev "
  "sharding_constraint slice split squeeze stack stop_gradient top_k transpose "
  "unstack empty random_wrap random_unwrap".split()
)
_ELEMENTWISE = frozenset(
  "abs add add_any and bitcast_convert_type ceil clamp convert_element_type "
  "div eq floor ge gt is_finite le lt max min mul ne neg nextafter not or "
  "reduce_precision rem round select_n shift_left shift_right_arithmetic "
  "shift_right_logical sign square sub xor cumsum cumprod cummax cummin".split()
)
_TRANSCENDENTAL = frozenset(
  "acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf erf_inv erfc exp "
  "exp2 expm1 lgamma log log1p logistic pow rsqrt sin sinh sqrt tan "
  "tanh".split()
)
_REDUCTIONS = frozenset(
  "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod "
  "reduce_sum reduce_xor".split()
)


def _count(eqn: core.JaxprEqn) -> tuple[int, int]:
  """FLOPs and transcendentals of one operation."""
  name, params = eqn.primitive.name, eqn.params
  inputs = [v.aval for v in eqn.invars]
  size = eqn.outvars[0].aval.size if eqn.outvars else 0
  if name in _FREE:
    return 0, 0
  if name in _ELEMENTWISE:
    return size, 0
  if name in _TRANSCENDENTAL:
    return 3 * size if name == "logistic" else 0, size
  if name in _REDUCTIONS:
    return inputs[0].size - size, 0
  if name == "dot_general":
    contracted = params["dimension_numbers"][0][0]
    return 2 * size * math.prod(inputs[0].shape[d] for d in contracted), 0
  if name == "integer_pow":
    return size * _multiplications(params["y"]), 0
  if name == "sort":
    return inputs[0].size * math.ceil(math.log2(max(inputs[0].size, 1))), 0
  if name == "gather":
    return _bounds(params["mode"], inputs[1], size), 0
  if name.startswith("scatter"):
    combine = 0 if name == "scatter" else inputs[2].size
    return combine + _bounds(params["mode"], inputs[1], 0), 0
  raise NotImplementedError(
    f"operation {name!r} of the model has no FLOP count; add it to a set in "
    "recjax/flops.py"
  )


def _bounds(mode: Any, indices, filled: int) -> int:
  """What clipping indices costs, or masking `filled` elements."""
  if mode == GatherScatterMode.CLIP:
    return indices.size
  if mode == GatherScatterMode.FILL_OR_DROP and filled:
    # Two comparisons and their conjunction an index, then one selection.
    return 4 * indices.size - indices.size // indices.shape[-1] + filled
  return 0


def _multiplications(power: int) -> int:
  """Of repeated squaring; one division more where the power is negative."""
  if power == 0:
    return 0
  bits = abs(power).bit_length() - 1 + abs(power).bit_count() - 1
  return bits + (power < 0)
