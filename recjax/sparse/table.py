"""Declaration, initialisation, storage and reading of row-sparse tables.

A method declares its tables as `{name: Table}`. Features that share one width
share one table: their vocabularies lie behind each other and `first_row` says
where each begins, so that a step needs one gather, one sort and one update
for all of them.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax import schema as schema_lib
from recjax.batch import Batch

# Physical rows are padded to this, so that rows divide over mesh axes.
ROW_MULTIPLE = 64
# Random numbers made at a time: their making takes several times their memory.
MAX_INIT_SIZE = 2**26


@dataclasses.dataclass(frozen=True)
class Table:
  """One table of `num_rows` vectors of width `dim`.

  Attributes:
    num_rows: Rows that ids may name.
    dim: Width of a row.
    first_row: Feature name -> row where its vocabulary begins. Empty for a
      table that is read inside the model.
    in_model: True if ids depend on activations; the model then reads the
      table with `in_model.read`.
    init_scale: Standard deviation of the initial normal values.
    learning_rate_scale: Multiplies the sparse learning rate.
    trained: False for a bank: rows that the model reads as constants and, in
      training, overwrites; see `Writes`. It has no state of an optimiser.
    stamps: Name of the bank whose rows' last writes this one dates: its single
      column is set to the number of the step, from 1; 0 is never. Float32
      holds numbers of steps up to 2 ** 24 exactly.
    dtype: `float32` or `bfloat16`. A bfloat16 table is stored as its bits
      (uint16), because XLA on the CPU converts a whole bfloat16 array to
      float32 at every use.

  Example:
    >>> Table(num_rows=100, dim=16, first_row={"item_id": 0}).shape
    (128, 16)
  """

  num_rows: int
  dim: int
  first_row: Mapping[str, int] = dataclasses.field(default_factory=dict)
  in_model: bool = False
  init_scale: float = 0.01
  learning_rate_scale: float = 1.0
  trained: bool = True
  stamps: str | None = None
  dtype: str = "float32"

  def __post_init__(self):
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(
        f"table dtype must be float32 or bfloat16, got {self.dtype!r}"
      )
    if self.in_model == bool(self.first_row):
      raise ValueError(
        "a table is read either by features (first_row) or inside the model "
        f"(in_model): got first_row={dict(self.first_row)}, "
        f"in_model={self.in_model}"
      )
    if self.trained and self.stamps or self.in_model and not self.trained:
      raise ValueError(
        "a bank (trained=False) is read by features, and only a bank stamps"
      )
    if self.stamps and (self.dim, self.dtype) != (1, "float32"):
      raise ValueError("a table that stamps has one column of float32")

  @property
  def shape(self) -> tuple[int, int]:
    """Physical shape; the rows are padded to a multiple of `ROW_MULTIPLE`."""
    padded = math.ceil(self.num_rows / ROW_MULTIPLE) * ROW_MULTIPLE
    return (padded, self.dim)

  @property
  def storage_dtype(self):
    """Type of the stored array."""
    return jnp.uint16 if self.dtype == "bfloat16" else jnp.float32


def embedding_table(
  schema: schema_lib.Schema, dim: int, *, init_scale: float = 0.01, **kwargs
) -> Table:
  """One table of width `dim` for all id features of `schema`.

  Features of the same vocabulary (an item id and the histories of item ids)
  share their rows.
  """
  first_row, start, vocab_start = {}, 0, {}
  for feature in schema.id_features:
    if feature.vocab not in vocab_start:
      vocab_start[feature.vocab] = start
      start += schema.vocab_sizes[feature.vocab]
    first_row[feature.name] = vocab_start[feature.vocab]
  return Table(
    num_rows=start,
    dim=dim,
    first_row=first_row,
    init_scale=init_scale,
    **kwargs,
  )


def init_table(rng: Array, table: Table) -> Array:
  """Normal values of standard deviation `init_scale`, in the storage type.

  The rows that only pad the table are zeros, as a row out of range reads.
  A large table is filled some columns at a time, and not some rows, so that
  one whose rows are sharded is born sharded.
  """
  num_rows, dim = table.shape
  num_blocks = next(
    n
    for n in range(1, dim + 1)
    if dim % n == 0 and (num_rows * dim <= n * MAX_INIT_SIZE or n == dim)
  )
  shape = (num_rows, dim // num_blocks)

  def make_block(rng):
    values = table.init_scale * jax.random.normal(rng, shape)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return to_storage(jnp.where(row < table.num_rows, values, 0.0), table)

  if num_blocks == 1:
    return make_block(rng)

  def fill(i, values):
    block = make_block(jax.random.fold_in(rng, i))
    return jax.lax.dynamic_update_slice(values, block, (0, i * shape[1]))

  empty = jnp.zeros(table.shape, table.storage_dtype)
  return jax.lax.fori_loop(0, num_blocks, fill, empty)


def to_storage(rows: Float[Array, "*rows dim"], table: Table) -> Array:
  """Float rows as they are stored."""
  if table.dtype == "bfloat16":
    return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
  return rows.astype(jnp.float32)


def from_storage(rows: Array, table: Table) -> Float[Array, "*rows dim"]:
  """Stored rows as float32."""
  if table.dtype == "bfloat16":
    rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
  return rows.astype(jnp.float32)


def gather(
  values: Array, ids: Int[Array, "*ids"], table: Table
) -> Float[Array, "*ids dim"]:
  """Rows `ids` in float32; an id out of range gives a row of zeros."""
  return from_storage(take_rows(values, ids), table)


def take_rows(values: Array, ids: Int[Array, "*ids"]) -> Array:
  """`values[ids]` as stored; zeros for ids out of range, negative ones too."""
  return values.at[ids].get(
    mode="fill", fill_value=0, wrap_negative_indices=False
  )


def feature_ids(table: Table, batch: Batch) -> Int[Array, " ids"]:
  """The rows that `batch` reads from `table`: all features, one flat array.

  Masked positions name a row past the end, which reads as zeros and is
  never updated. So do the examples that only pad the batch.
  """
  parts = []
  for name, first_row in table.first_row.items():
    ids = batch.ids[name]
    mask = batch.example_mask
    if name in batch.id_mask:
      mask = batch.id_mask[name] & mask[:, None]
    ids = jnp.where(mask, ids + first_row, table.shape[0])
    parts.append(ids.reshape(-1))
  return jnp.concatenate(parts).astype(jnp.int32)


def split_rows(
  rows: Float[Array, "ids dim"], table: Table, batch: Batch
) -> dict[str, Float[Array, "batch ... dim"]]:
  """Undoes the concatenation of `feature_ids`: feature name -> its rows."""
  shapes = [batch.ids[name].shape for name in table.first_row]
  # The transpose of `split` is one concatenation; slices would give one padded
  # copy of the whole array per feature.
  sizes = [math.prod(shape) for shape in shapes]
  parts = jax.lax.split(rows, sizes, axis=0)
  return {
    name: part.reshape(*shape, table.dim)
    for name, part, shape in zip(table.first_row, parts, shapes, strict=True)
  }
