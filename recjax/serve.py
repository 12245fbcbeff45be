"""Scores many candidates for one user, whose side is computed once.

A request is one user (history, profile, context) and many candidates. Scoring
each pair anew repeats the user's part for every candidate:

```python
ranker = Ranker(method, candidate_features=("video_id", "author_id"))
user_state = ranker.encode_user(state, user_batch)     # once
scores = ranker.score(state, user_state, candidates)   # {"click": [512]}
```

What is computed once depends on the model:

* A model with `encode_user(batch, rows) -> encoded` and `decode(encoded, batch,
  rows, *, train)` (HyFormer, LONGER, DIN) says so itself: its sequences are
  encoded once. `encoded` has a leading axis of one user.
* Every other model sees a list only as the mean of its rows
  (`layers.features.pooled_rows`): lists are read and pooled once.

Single rows of the user are read once and spread over the candidates in both.
The scores are those of the model for each pair, to rounding.

A user's state can be kept between requests: `UserCache` holds the latest within
a budget of bytes, and `Ranker.append` adds new events to it where the model's
maths allows it.
"""

import collections
import functools
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.features import masked_mean
from recjax.method import Method
from recjax.schema import suggest
from recjax.sparse import table as table_lib
from recjax.train_state import TrainState


@struct.dataclass
class UserState:
  """What is computed once for a user; every array has a leading axis of 1.

  Attributes:
    batch: The user's example; its lists are cut to nothing.
    rows: Table -> feature of the user -> its row, or the mean of its rows.
    counts: List feature that is pooled -> events in its mean.
    encoded: What the model's own `encode_user` gave; None without one.
  """

  batch: Batch
  rows: dict[str, dict[str, Array]]
  counts: dict[str, Int[Array, "1"]]
  encoded: Any

  @property
  def nbytes(self) -> int:
    """Bytes of all its arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


class Ranker:
  """A method that scores candidates for one user at a time.

  Args:
    method: What scores.
    candidate_features: Names of the features that differ between candidates;
      all others belong to the user or the request.

  Raises:
    UserError: If a name is no feature, or a sequence that the model encodes
      for the user is one of the candidate's.

  Example:
    >>> ranker = Ranker(method, ("video_id",))          # doctest: +SKIP
    >>> user_state = ranker.encode_user(state, user_batch)
    >>> ranker.score(state, user_state, candidates)["click"].shape
    (512,)
  """

  def __init__(self, method: Method, candidate_features: Iterable[str]):
    self.method = method
    self.candidate_features = frozenset(candidate_features)
    schema = method.schema
    names = [feature.name for feature in schema.features]
    for name in self.candidate_features:
      if name not in names:
        raise UserError(
          f"candidate_features: unknown feature {name!r}" + suggest(name, names)
        )
    self._encodes = hasattr(type(method.model), "encode_user")
    encoded = getattr(method.model, "encoded_features", None)
    if encoded is None:
      encoded = [f.name for f in schema.id_features if f.kind == "sequence"]
    for name in self.candidate_features.intersection(encoded):
      if self._encodes:
        raise UserError(
          f"candidate_features: {name!r} is a sequence, which "
          f"{method.name} encodes once a user; leave it out"
        )
    self._lists = [
      f.name
      for f in schema.id_features
      if f.is_list and f.name not in self.candidate_features
    ]
    # Columns of `Batch.dense` that come from the candidate.
    self._dense = [
      f.name in self.candidate_features for f in schema.dense_features
    ]
    self._encode = jax.jit(self._encode_user)
    self._score = jax.jit(self._score_candidates)
    self._append = jax.jit(self._append_events)

  def encode_user(self, state: TrainState, user_batch: Batch) -> UserState:
    """The user's part.

    Args:
      state: Parameters and tables.
      user_batch: One example; what it holds of a candidate is ignored.

    Raises:
      ValueError: If there is not exactly one example.
    """
    if user_batch.size != 1:
      raise ValueError(
        f"a user is one example, got {user_batch.size}; encode users one by one"
      )
    return self._encode(state, user_batch)

  def score(
    self, state: TrainState, user_state: UserState, candidates: Batch
  ) -> dict[str, Float[Array, " candidates"]]:
    """Task -> the model's output for each candidate, a logit or `symlog`.

    Each number of candidates compiles one program: pad to a few sizes.

    Args:
      state: The state that the user was encoded with.
      user_state: From `encode_user`.
      candidates: One example a candidate; only the candidate's features and
        `example_mask` are read.
    """
    return self._score(state, user_state, candidates)

  def append(
    self,
    state: TrainState,
    user_state: UserState,
    events: Mapping[str, Int[Array, " events"]],
  ) -> UserState:
    """The user's state after new events, without the old ones being read.

    Args:
      state: The state that the user was encoded with.
      user_state: From `encode_user`.
      events: List feature -> rows of its vocabulary, oldest first.

    Raises:
      UserError: If the model has an encoder of its own, a name is no list of
        the user, or the list would outgrow `max_len`, so that its oldest events
        had to go: encode the user again.
    """
    if self._encodes:
      raise UserError(
        f"{self.method.name} encodes the order and age of events, which all "
        "change with a new one; call encode_user again"
      )
    for name, ids in events.items():
      if name not in self._lists:
        raise UserError(
          f"append: {name!r} is no list of the user"
          + suggest(name, self._lists)
        )
      longest = self.method.schema.feature(name).max_len
      length = int(user_state.counts[name][0]) + len(ids)
      if length > longest:
        raise UserError(
          f"append: {name!r} would hold {length} events and keeps {longest}; "
          "call encode_user with the latest ones"
        )
    return self._append(state, user_state, dict(events))

  def _encode_user(self, state: TrainState, batch: Batch) -> UserState:
    method = self.method
    rows = {
      name: {k: v for k, v in rows.items() if k not in self.candidate_features}
      for name, rows in method.read_features(state.tables, batch).items()
    }
    encoded = None
    if self._encodes:
      encoded = method.call(
        state.eval_params, state.tables, batch, rows, method="encode_user"
      )
    for table in rows.values():
      for name in set(table).intersection(self._lists):
        table[name] = masked_mean(table[name], batch.id_mask[name])
    counts = {name: batch.id_mask[name].sum(-1) for name in self._lists}
    return UserState(self._without_lists(batch), rows, counts, encoded)

  def _score_candidates(
    self, state: TrainState, user_state: UserState, candidates: Batch
  ) -> dict[str, Array]:
    method, user = self.method, user_state.batch
    num = candidates.size
    spread = lambda x: jnp.broadcast_to(x, (num, *x.shape[1:]))  # noqa: E731

    def merge(of_user, of_candidate):
      return {
        name: of_candidate[name]
        if name in self.candidate_features
        else spread(value)
        for name, value in of_user.items()
      }

    rows = method.read_features(
      state.tables, candidates, only=self.candidate_features
    )
    rows = {
      table: {name: spread(row) for name, row in of_user.items()}
      | rows.get(table, {})
      for table, of_user in user_state.rows.items()
    }
    batch = candidates.replace(
      dense=jnp.where(
        jnp.array(self._dense, bool), candidates.dense, spread(user.dense)
      ),
      ids=merge(user.ids, candidates.ids),
      id_mask=merge(user.id_mask, candidates.id_mask),
      vectors=merge(user.vectors, candidates.vectors),
      tokens=merge(user.tokens, candidates.tokens),
      token_mask=merge(user.token_mask, candidates.token_mask),
      scenario=self._scenario(user, candidates, spread),
    )
    call = functools.partial(method.call, state.eval_params, state.tables)
    if self._encodes:
      encoded = user_state.encoded
      predictions, _ = call(encoded, batch, rows, train=False, method="decode")
    else:
      predictions, _ = call(batch, rows, train=False)
    return predictions

  def _append_events(self, state, user_state, events):
    rows = {table: dict(of) for table, of in user_state.rows.items()}
    counts = dict(user_state.counts)
    for name, ids in events.items():
      total = counts[name] + len(ids)
      for table in rows:
        if name in rows[table]:
          new = self._rows_of(state, table, name, ids)
          old = rows[table][name] * counts[name][:, None]
          total_rows = old + new.sum(axis=0, keepdims=True)
          rows[table][name] = total_rows / jnp.maximum(total, 1)[:, None]
      counts[name] = total
    return user_state.replace(rows=rows, counts=counts)

  def _rows_of(self, state, table: str, name: str, ids) -> Array:
    declared = self.method.tables[table]
    return table_lib.gather(
      state.tables[table], ids + declared.first_row[name], declared
    )

  def _scenario(self, user: Batch, candidates: Batch, spread):
    role = self.method.schema.roles.scenario
    if role in self.candidate_features:
      return candidates.scenario
    return spread(user.scenario)

  def _without_lists(self, batch: Batch) -> Batch:
    """No ids of lists: what was made of their rows stands for them."""
    ids = {
      name: value[:, :0] if name in self._lists else value
      for name, value in batch.ids.items()
    }
    mask = {
      name: value[:, :0] if name in self._lists else value
      for name, value in batch.id_mask.items()
    }
    return batch.replace(
      ids=ids, id_mask=mask, labels={}, label_mask={}, event_age={}
    )


class UserCache:
  """The states of the users seen last, within a budget of bytes.

  Args:
    max_bytes: Most bytes of all states together, at least 1.

  Example:
    >>> cache = UserCache(max_bytes=1 << 30)            # doctest: +SKIP
    >>> user_state = cache.get("u7") or cache.put("u7", encode("u7"))
  """

  def __init__(self, max_bytes: int):
    if max_bytes < 1:
      raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    self.max_bytes = max_bytes
    self.nbytes = 0
    self._states: collections.OrderedDict[Hashable, UserState] = (
      collections.OrderedDict()
    )

  def get(self, user: Hashable) -> UserState | None:
    """The user's state, now the latest used; None if it is not held."""
    if user in self._states:
      self._states.move_to_end(user)
    return self._states.get(user)

  def put(self, user: Hashable, user_state: UserState) -> UserState:
    """Holds a state, and drops the longest unused ones over the budget.

    A state larger than the whole budget is not held.
    """
    self.discard(user)
    if user_state.nbytes <= self.max_bytes:
      self._states[user] = user_state
      self.nbytes += user_state.nbytes
      while self.nbytes > self.max_bytes:
        self.discard(next(iter(self._states)))
    return user_state

  def discard(self, user: Hashable) -> None:
    """Drops a user's state, if it is held; call it when parameters change."""
    found = self._states.pop(user, None)
    if found is not None:
      self.nbytes -= found.nbytes

  def __len__(self) -> int:
    return len(self._states)
