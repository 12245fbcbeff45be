"""The types of a kernel's results."""

from collections.abc import Sequence

import jax
from jax.sharding import ManualAxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def result_type(
  shape: Sequence[int], dtype, *inputs: jax.Array
) -> jax.ShapeDtypeStruct:
  """A result for `jax.ffi.ffi_call`, given all arrays that go in.

  Inside of `shard_map` a result differs over the mesh where any input does,
  which the call does not find out by itself.
  """
  types = [jax.typeof(x) for x in inputs]
  varying = frozenset().union(*(t.manual_axis_type.varying for t in types))
  return jax.ShapeDtypeStruct(
    shape,
    dtype,
    sharding=NamedSharding(types[0].sharding.mesh, P(*(None for _ in shape))),
    manual_axis_type=ManualAxisType(varying=varying),
  )
