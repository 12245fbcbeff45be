"""Tables that a model reads by ids it has just computed.

The rows of such a read cannot be gathered before the model, so the table
enters it as a constant, and the gradient comes out another way. The read takes
a *tap*, an array of zeros of the output's shape, as if it were added to its
result; the gradient at the tap is the gradient g of the output, and with the
(ids, weights) that the model returns, row `ids[..., j]` receives
`weights[..., j] * g`. No array of the table's size appears.

Inside a Linen module:

```python
output = in_model.read(self, "values", ids, weights)
```

reads the table declared under the module's path (`memory_0/values`). Every
declared table must be read exactly once: a read that is missing, doubled or
undeclared is an error, for it would be a table that silently never trains.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int

import pallas_kernels
from recjax.sparse.table import Table

# Linen collections: the constant tables and the zero taps that go in, the
# (ids, weights) that come out.
TABLES, TAPS, READS = "tables", "taps", "reads"


def read(
  module: nn.Module,
  name: str,
  ids: Int[Array, "*batch top_k"],
  weights: Float[Array, "*batch top_k"],
) -> Float[Array, "*batch dim"]:
  """Weighted sum of rows: `sum_k weights[..., k] * table[ids[..., k]]`.

  Args:
    module: The Linen module that owns the table.
    name: Name of the table below the module's path.
    ids: Rows; an id out of range reads zeros and trains nothing.
    weights: Their weights, in float32; differentiable.

  Returns:
    The sums in float32.

  Raises:
    ValueError: If the table is not declared, or read twice.
  """
  path = "/".join((*module.path, name))
  if not module.has_variable(TABLES, name):
    raise ValueError(
      f"the model reads table {path!r}, which it does not declare; add it to "
      "the method's tables()"
    )
  if module.has_variable(READS, name):
    raise ValueError(
      f"table {path!r} is read twice in one step; read it once with all ids, "
      "or declare a second table"
    )
  values = module.get_variable(TABLES, name)
  shape = (*ids.shape[:-1], values.shape[-1])
  module.put_variable(READS, name, {"ids": ids, "weights": weights})
  tap = None
  if module.has_variable(TAPS, name):
    tap = module.get_variable(TAPS, name)
    if tap.shape != shape:
      raise ValueError(
        f"the tap of {path!r} has shape {tap.shape}, the read {shape}"
      )
  return weighted_gather(values, ids, weights, tap)


def weighted_gather(
  values: Array,
  ids: Int[Array, "*batch top_k"],
  weights: Float[Array, "*batch top_k"],
  tap: Float[Array, "*batch dim"] | None = None,
) -> Float[Array, "*batch dim"]:
  """`sum_k weights[..., k] * values[ids[..., k]]`; `values` is a constant.

  bfloat16 tables are recognised by their bits (uint16). The gradient of `tap`
  is that of the sums, and is there only when the table has been read for that
  of the weights: what updates the table with it finds nobody reading.
  """
  values = jax.lax.stop_gradient(values)
  return pallas_kernels.sparse_gather(values, ids, weights, tap=tap)


def collection(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """`{"memory_0/values": x}` as the nested collection that Linen wants."""
  return traverse_util.unflatten_dict(dict(arrays), sep="/")


def flatten_reads(reads: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
  """`{"memory_0/values": {"ids": ..., "weights": ...}}` from a collection."""
  flat = traverse_util.flatten_dict(dict(reads), sep="/")
  names = sorted({path.rsplit("/", 1)[0] for path in flat})
  return {
    name: {"ids": flat[f"{name}/ids"], "weights": flat[f"{name}/weights"]}
    for name in names
  }


def check_reads(reads: Mapping[str, Any], tables: Mapping[str, Table]):
  """Raises unless the model read every in-model table that it declares."""
  declared = {name for name, table in tables.items() if table.in_model}
  missing = sorted(declared - set(reads))
  if missing:
    raise ValueError(
      f"declared in-model tables {missing} were not read by the model; they "
      "would never train. Read them with in_model.read or do not declare them"
    )


def zero_taps(
  reads: Mapping[str, Any], tables: Mapping[str, Table]
) -> dict[str, Array]:
  """Taps for the shapes of `reads` (arrays or shape structs)."""
  return {
    name: jnp.zeros((*entry["ids"].shape[:-1], tables[name].dim))
    for name, entry in reads.items()
  }
