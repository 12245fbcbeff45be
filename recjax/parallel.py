"""Where state and batches live: one device, a mesh under `jit`, or `pmap`.

Three thin wrappers around the same step:

* `mesh`: `jit` over a named mesh (`data`, `model`). Batches are split over
  `data`, the rows of tables over `model`, dense parameters are replicated. A
  mesh of one device is the plain case.
* `pmap`: tables replicated; every replica gathers all row gradients and makes
  the same update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from recjax.batch import Batch
from recjax.errors import UserError

DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True)
class Config:
  """How devices are used.

  Attributes:
    mode: `mesh` or `pmap`.
    data: Devices that share a batch; 0 takes all that `model` leaves.
    model: Devices that share the rows of tables (`mesh` only).
  """

  mode: str = "mesh"
  data: int = 1
  model: int = 1

  def __post_init__(self):
    if self.mode not in ("mesh", "pmap"):
      raise UserError(
        f"parallel.mode must be 'mesh' or 'pmap', got {self.mode!r}"
      )
    if self.mode == "pmap" and self.model != 1:
      raise UserError(
        "parallel.mode=pmap replicates tables: parallel.model must be 1, got "
        f"{self.model}; use parallel.mode=mesh to share rows"
      )
    available = jax.device_count()
    if self.data < 0 or self.model < 1 or self.num_devices > available:
      raise UserError(
        f"parallel.data={self.data} x parallel.model={self.model} needs "
        f"{self.num_devices} devices, {available} are there"
      )

  @property
  def num_devices(self) -> int:
    """Devices in use."""
    data = self.data or max(jax.device_count() // self.model, 1)
    return data * self.model


class MeshPlacement:
  """`jit` over a mesh (`data`, `model`); one device is the mesh of one."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self.mesh = mesh
    self.replicated = NamedSharding(self.mesh, P())
    self.batch_sharding = NamedSharding(self.mesh, P(DATA))

  @property
  def num_data(self) -> int:
    """Parts that a batch is split into."""
    return self.mesh.shape[DATA]

  def shardings(self, state: Any) -> Any:
    """Sharding of every leaf of a train state: table rows over `model`."""
    rows = NamedSharding(self.mesh, P(MODEL))
    return jax.tree.map(lambda _: self.replicated, state).replace(
      tables=jax.tree.map(lambda _: rows, state.tables),
      table_states=jax.tree.map(lambda _: rows, state.table_states),
    )

  def init(self, fn: Callable[..., Any], *args) -> Any:
    """`fn(*args)`, a train state that is born sharded."""
    shardings = self.shardings(jax.eval_shape(fn, *args))
    return jax.jit(fn, out_shardings=shardings)(*args)

  def transform(self, fn: Callable[[Any], Any], state: Any) -> Any:
    """`fn(state)`, another train state in the same place."""
    return self.init(fn, state)

  def compile_step(
    self, step: Callable[..., Any], state: Any
  ) -> Callable[..., Any]:
    """`step(state, batch) -> (state, scalars)` with the state donated."""
    return jax.jit(
      self._traced(step),
      donate_argnums=0,
      out_shardings=(self.shardings(state), self.replicated),
    )

  def eval_state(self, state: Any) -> Any:
    """The state as `compile_eval` takes it; once an evaluation."""
    return state

  def compile_eval(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(state, batch)` whose outputs are whole on every device."""
    return jax.jit(self._traced(fn), out_shardings=self.replicated)

  def put_batch(self, batch: Batch) -> Batch:
    """The host's part of a global batch, split over `data`."""
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        self.batch_sharding, np.asarray(x)
      ),
      batch,
    )

  def canonical(self, state: Any) -> Any:
    """The state as a checkpoint holds it."""
    return state

  def restore_target(self, state: Any) -> Any:
    """Shapes and shardings to restore a checkpoint into."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      self.shardings(state),
    )

  def from_canonical(self, state: Any) -> Any:
    """A restored state, ready for `compile_step`."""
    return state

  def scalars(self, tree: Any) -> Any:
    """Results of a step on the host."""
    return jax.device_get(tree)

  def _traced(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as it is traced for this mesh."""
    if self.mesh.size == 1:
      return fn

    def run(*args):
      # The compiler cannot cut the call of a kernel into parts: it would
      # gather every table and batch on each device.
      with pallas_kernels.use("xla"):
        return fn(*args)

    return run


class PmapPlacement:
  """`pmap` over the leading axis; everything but the batch is replicated."""

  def __init__(self, config: Config):
    self.devices = jax.devices()[: config.num_devices]
    self._single = MeshPlacement(make_mesh(Config()))

  @property
  def num_data(self) -> int:
    """Parts that a batch is split into."""
    return len(self.devices)

  def init(self, fn: Callable[..., Any], *args) -> Any:
    """`fn(*args)`, the same on every device, with a leading device axis."""
    replicate = jax.pmap(
      lambda _: fn(*args), axis_name=DATA, devices=self.devices
    )
    return replicate(jnp.arange(len(self.devices)))

  def transform(self, fn: Callable[[Any], Any], state: Any) -> Any:
    """`fn(state)`, another train state in the same place."""
    return jax.pmap(fn, axis_name=DATA, devices=self.devices)(state)

  def compile_step(
    self, step: Callable[..., Any], state: Any
  ) -> Callable[..., Any]:
    """`step(state, batch) -> (state, scalars)` with the state donated."""
    del state
    return jax.pmap(
      lambda state, batch: step(state, batch, axis_name=DATA),
      axis_name=DATA,
      devices=self.devices,
      donate_argnums=0,
    )

  def eval_state(self, state: Any) -> Any:
    """The state as `compile_eval` takes it: the first replica's."""
    return jax.device_put(self.canonical(state))

  def compile_eval(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(eval_state, batch)` on the first device."""
    run = self._single.compile_eval(fn)
    return lambda state, batch: run(state, self._single.put_batch(_join(batch)))

  def put_batch(self, batch: Batch) -> Batch:
    """Gives every device its slice of the batch."""
    num = len(self.devices)
    return jax.tree.map(
      lambda x: np.asarray(x).reshape(num, -1, *x.shape[1:]), batch
    )

  def canonical(self, state: Any) -> Any:
    """The state without the device axis."""
    return jax.tree.map(lambda x: np.asarray(x[0]), state)

  def restore_target(self, state: Any) -> Any:
    """Shapes and shardings to restore a checkpoint into."""
    single = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state
    )
    return self._single.restore_target(single)

  def from_canonical(self, state: Any) -> Any:
    """A restored state, copied to every device."""
    host = jax.device_get(state)
    return jax.pmap(
      lambda _: jax.tree.map(jnp.asarray, host), devices=self.devices
    )(jnp.arange(len(self.devices)))

  def scalars(self, tree: Any) -> Any:
    """Results of a step on the host; equal on all devices."""
    return jax.device_get(jax.tree.map(lambda x: x[0], tree))


def place(config: Config) -> MeshPlacement | PmapPlacement:
  """The wrapper that `config.mode` names."""
  if config.mode == "pmap":
    return PmapPlacement(config)
  return MeshPlacement(make_mesh(config))


def make_mesh(config: Config) -> jax.sharding.Mesh:
  """The mesh (`data`, `model`) of the devices that are here."""
  num = config.num_devices
  return jax.make_mesh(
    (num // config.model, config.model),
    (DATA, MODEL),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=jax.devices()[:num],
  )


def _join(batch: Batch) -> Batch:
  return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), batch)
