"""The histories of KuaiRand: what a row of the log sees of its user."""

import numpy as np

from recjax.data import causal, kuairand_features, kuairand_source
from recjax.data.columns import ColumnWriter

# What is known of an event -> the feature whose vocabulary it shares.
SIDES = {
  "author": "author_id",
  "tag": "tag",
  "tab": "tab",
  "duration": "duration_bucket",
}


def write(
  data: kuairand_features.Data,
  vocabularies,
  writer: ColumnWriter,
  sequences: tuple[str, ...],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Writes each user's events once; returns every row's slice of them."""
  kinds = sequences or kuairand_source.KINDS
  slices = {
    f"{kind}_history": (
      kuairand_features.mapped(
        data, f"{kind}_start", np.int64, (data.num_events,)
      ),
      kuairand_features.mapped(
        data, f"{kind}_length", np.int32, (data.num_events,)
      ),
    )
    for kind in kinds
  }
  for low, high in _user_ranges(data):
    rows = np.concatenate(
      [
        block[
          (data.events["user"][block] >= low)
          & (data.events["user"][block] < high)
          & ~data.events["stored"][block]
        ]
        for block in data.blocks()
      ]
    )
    for kind in kinds:
      events = _history_events(data, kind, rows, low, high)
      values = vocabularies.event_rows(events)
      more = {}
      if sequences:
        sides = {f"{kind}_{side}": values[side] for side in SIDES}
        more = {"time": events["time"] / 1000, "sides": sides}
      name = f"{kind}_history"
      first = writer.append_values(name, values["video"], **more)
      if kind == "watch" and not sequences:
        writer.append_values("author_history", values["author"])
      start, length = causal.visible_slices(
        events["user"],
        events["time"],
        events["part"],
        *(data.events[column][rows] for column in ("user", "time", "part")),
      )
      starts, lengths = slices[name]
      starts[rows], lengths[rows] = first + start, length
  if sequences:
    return slices
  # Authors are listed as the videos are, so their slices are the same.
  return slices | {"author_history": slices["watch_history"]}


def _user_ranges(data: kuairand_features.Data):
  """Ranges of users with at most `max_rows` events, or of one user."""
  count = np.zeros(data.num_users, np.int64)
  for rows in data.blocks():
    count += np.bincount(data.events["user"][rows], minlength=data.num_users)
  total = np.append(0, np.cumsum(count))
  low = 0
  while low < data.num_users:
    high = np.searchsorted(total, total[low] + data.max_rows, side="right") - 1
    high = max(int(high), low + 1)
    yield low, high
    low = high


def _history_events(
  data: kuairand_features.Data, kind: str, rows, low: int, high: int
):
  """The events of one kind of users in [low, high), by user, part, time."""
  stored = data.histories[kind]
  mine = slice(*np.searchsorted(stored.user, [low, high]))
  if kind != "watch":
    label = {"like": "like", "long_watch": "long_view"}[kind]
    rows = rows[kuairand_features.outcome(data.events, rows, label) == 1]
  events = {
    name: np.concatenate([getattr(stored, name)[mine], data.events[name][rows]])
    for name in ("user", "video", "time")
  }
  codes = data.row_codes(rows)
  unknown = np.full(len(events["user"]) - len(rows), -1)
  events["tab"] = np.concatenate([unknown, codes["tab"]])
  events["duration"] = np.concatenate([unknown, codes["duration_bucket"]])
  part = np.zeros(len(events["user"]), np.int64)
  part[len(part) - len(rows) :] = data.events["part"][rows]
  order = np.lexsort((events["time"], part, events["user"]))
  events["part"] = part
  return {name: column[order] for name, column in events.items()}
