"""Which documents of a batch are encoded, and where their vectors go.

The vectors of documents live in a bank by document id (LEMUR, arXiv
2511.10962). A step encodes some documents of its batch, each once however often
it occurs, writes them to the bank and reads histories from it; the write comes
before the read. A bank of millions of rows is read before the model and written
after it, so inside the step the fresh vectors are joined into what was read.

All shapes are static. Id 0 stands for every unknown document: it has no row,
and two of it are two documents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_NONE = jnp.iinfo(jnp.int32).max


class Chosen(NamedTuple):
  """The documents that a step encodes.

  Attributes:
    examples: The example whose text a slot encodes.
    is_used: False where a slot is left over.
    slot: The slot of each example's document; -1 if it is not encoded.
  """

  examples: Int[Array, " slots"]
  is_used: Bool[Array, " slots"]
  slot: Int[Array, " batch"]


def choose(
  ids: Int[Array, " batch"],
  valid: Bool[Array, " batch"],
  is_filled: Bool[Array, " batch"],
  num_slots: int,
  rng: Array | None = None,
  is_resting: Bool[Array, " batch"] | None = None,
) -> Chosen:
  """Chooses documents at random, those without a stored vector first.

  Args:
    ids: Document of each example.
    valid: False for padding.
    is_filled: Whether the bank holds the document.
    num_slots: Most documents to encode; with as many as examples all are, and
      no randomness is needed.
    rng: A document's chance depends on it and its id alone, and not on its
      place in the batch.
    is_resting: Documents that are not encoded this time if they are filled.

  Example:
    >>> ids = jnp.array([5, 7, 5, 0, 0])
    >>> valid, filled = jnp.ones(5, bool), jnp.zeros(5, bool)
    >>> choose(ids, valid, filled, 5).slot.tolist()
    [0, 1, 0, 3, 4]
  """
  batch = len(ids)
  place = jnp.arange(batch, dtype=jnp.int32)
  owner = first_occurrence(jnp.where(valid, ids, 0))
  is_wanted = (owner == place) & valid
  if is_resting is not None:
    is_wanted &= ~(is_resting & is_filled)
  if num_slots >= batch:
    examples, is_used = place, is_wanted
  else:
    priority = uniform_by_id(rng, ids, 0) + jnp.where(is_filled, 0.0, 1.0)
    priority = jnp.where(is_wanted, priority, -1.0)
    best, examples = jax.lax.top_k(priority, num_slots)
    is_used = best >= 0
    # In random order: a prefix, such as that with gradients, is a fair sample.
    order = jnp.argsort(
      jnp.where(is_used, uniform_by_id(rng, ids[examples], 1), 2.0)
    )
    examples, is_used = examples[order].astype(jnp.int32), is_used[order]
  slots = jnp.arange(len(examples), dtype=jnp.int32)
  slot = jnp.full((batch,), -1, jnp.int32)
  slot = slot.at[examples].set(jnp.where(is_used, slots, -1))
  return Chosen(examples, is_used, jnp.where(valid, slot[owner], -1))


def first_occurrence(ids: Int[Array, " n"]) -> Int[Array, " n"]:
  """Where each id stands first; each 0 stands for itself.

  Example:
    >>> first_occurrence(jnp.array([4, 0, 4, 0, 9])).tolist()
    [0, 1, 0, 3, 4]
  """
  order = jnp.argsort(ids, stable=True).astype(jnp.int32)
  ordered = ids[order]
  is_first = jnp.concatenate(
    [jnp.ones((1,), bool), ordered[1:] != ordered[:-1]]
  ) | (ordered == 0)
  # The place of the last beginning of a run, in the sorted order.
  begin = jax.lax.cummax(jnp.where(is_first, jnp.arange(len(ids)), 0))
  return jnp.zeros_like(order).at[order].set(order[begin])


def appearances(
  ids: Int[Array, " batch"], valid: Bool[Array, " batch"]
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
  """Each document of the batch once, and how often it is there.

  Returns:
    Documents, -1 for copies, unknown ones and padding; and their counts.
  """
  owner = first_occurrence(jnp.where(valid, ids, 0))
  count = jnp.zeros(len(ids)).at[owner].add(valid.astype(jnp.float32))
  is_first = (owner == jnp.arange(len(ids))) & valid & (ids > 0)
  return jnp.where(is_first, ids, -1), count


def join(
  stale: Float[Array, "users length dim"],
  stale_ids: Int[Array, "users length"],
  fresh: Float[Array, "slots dim"],
  fresh_ids: Int[Array, " slots"],
) -> tuple[Float[Array, "users length dim"], Bool[Array, "users length"]]:
  """What the bank would give if `fresh` had been written before it was read.

  Args:
    stale: What it gave.
    stale_ids: The documents.
    fresh: Vectors as they are stored.
    fresh_ids: Their documents, all different; 0 and below are none.

  Returns:
    The vectors, and where they are fresh.
  """
  keys = jnp.where(fresh_ids > 0, fresh_ids, _NONE)
  order = jnp.argsort(keys)
  keys = keys[order]
  at = jnp.minimum(jnp.searchsorted(keys, stale_ids), len(keys) - 1)
  is_fresh = (keys[at] == stale_ids) & (stale_ids > 0)
  joined = jnp.where(is_fresh[..., None], fresh[order[at]], stale)
  return joined, is_fresh


def latest(
  values: Array, mask: Bool[Array, "users max_len"], length: int
) -> tuple[Array, Bool[Array, "users length"]]:
  """The last `length` valid events, the newest at the end.

  Args:
    values: `[users, max_len, ...]`, oldest first, valid ones before the others.
    mask: Valid positions.
    length: Of the result; missing events are zeros and come first.

  Example:
    >>> mask = jnp.array([[True, True, False]])
    >>> latest(jnp.array([[7, 8, 0]]), mask, 4)[0].tolist()
    [[0, 0, 7, 8]]
  """
  place = mask.sum(axis=-1)[:, None] - length + jnp.arange(length)[None]
  valid = place >= 0
  at = jnp.maximum(place, 0).reshape(*place.shape, *[1] * (values.ndim - 2))
  found = jnp.take_along_axis(values, at, axis=1, mode="clip")
  wide = valid.reshape(at.shape)
  return jnp.where(wide, found, jnp.zeros((), values.dtype)), valid


def uniform_by_id(
  rng: Array, ids: Int[Array, " n"], stream: int
) -> Float[Array, " n"]:
  """A number in [0, 1) for each id, the same for equal ids."""
  rng = jax.random.fold_in(rng, stream)
  draw = lambda i: jax.random.uniform(jax.random.fold_in(rng, i))  # noqa: E731
  return jax.vmap(draw)(ids)
