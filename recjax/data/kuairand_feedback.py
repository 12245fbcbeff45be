"""Who gave a KuaiRand video its feedback: features that PROMO asks for.

Off by default; `data.feedback` of `recjax.data.kuairand` adds

* `positive_history`: videos that the user liked to see;
* `pinnacle_users`, `negative_users`: users with positive feedback on the row's
  video and users who saw it without a click. `feedback="pinnacle"`: the best
  by stay time and interactions, and a random draw; `"recent"`: the latest of
  both, as in the code that the authors of PROMO released;
* `item_exposures`, `item_positives`: buckets of how often the video has been
  seen and liked to be seen: 0, 1-4, 5-9, 10-49, 50+.

All by the rule of `recjax.data.feedback`. Positive is a click. Of the stored
lists clicks are unknown: there a long view is positive and nothing negative.
Stay is the play time, unknown for stored events; interactions are likes,
follows, comments, forwards and visits of the profile, less hates (our choice).

`protocol="released"` repeats the published evaluation: positive rows find
their own event in the lists, and rows of the test part without a click are
described by the first user of the vocabulary alone.
"""

import dataclasses

import numpy as np
import pyarrow as pa

from recjax.data import causal, kuairand_features, pseudo_feedback
from recjax.data import feedback as feedback_lib
from recjax.errors import UserError
from recjax.schema import Feature, suggest

KINDS = ("pinnacle", "recent")
_BUCKETS = ("item_exposures", "item_positives")
_INTERACTIONS = ("like", "follow", "comment", "forward", "profile_enter")
_NEGATIVE_SEED = 0


@dataclasses.dataclass
class Feedback:
  """What the option adds; empty where it is off.

  Attributes:
    lists: Feature -> start and length of each row's slice of its values.
    buckets: Feature -> vocabulary row by row of the log.
    values: Vocabulary -> what its rows stand for.
  """

  lists: dict[str, tuple[np.ndarray, np.ndarray]]
  buckets: dict[str, np.ndarray]
  values: dict[str, pa.Array]

  def ids(self, rows) -> dict[str, np.ndarray]:
    """The buckets of some rows."""
    return {name: column[rows] for name, column in self.buckets.items()}


def check(config) -> None:
  """Raises a `UserError` for options that do not fit."""
  if config.feedback and config.feedback not in KINDS:
    raise UserError(
      f"data.feedback: unknown kind {config.feedback!r}"
      + suggest(config.feedback, KINDS)
    )
  if config.feedback_len < 1:
    raise UserError(
      f"data.feedback_len must be at least 1, got {config.feedback_len}"
    )
  if config.protocol not in feedback_lib.PROTOCOLS:
    raise UserError(
      f"data.protocol: unknown protocol {config.protocol!r}"
      + suggest(config.protocol, feedback_lib.PROTOCOLS)
    )
  if config.protocol == "released" and not config.feedback:
    raise UserError(
      "data.protocol 'released' is about feedback lists; set data.feedback "
      "to pinnacle or recent"
    )
  pseudo_feedback.check(config.pseudo_neighbors, config.protocol)
  if config.pseudo_neighbors and not config.feedback:
    raise UserError(
      "data.pseudo_neighbors fills feedback lists; set data.feedback to "
      "pinnacle or recent"
    )


def features(config) -> list[Feature]:
  """The features that the option adds to the schema."""
  if not config.feedback:
    return []
  return [
    *(Feature(name, "sparse") for name in _BUCKETS),
    Feature(
      "positive_history",
      "sequence",
      vocabulary="video_id",
      max_len=config.max_len,
    ),
    *(
      Feature(
        name, "sequence", vocabulary="user_id", max_len=config.feedback_len
      )
      for name in ("pinnacle_users", "negative_users")
    ),
  ]


def write(data, vocabularies, writer, config) -> Feedback:
  """Writes the lists' values and returns what rows hold of them.

  Args:
    data: The `kuairand_features.Data`.
    vocabularies: Gives the rows of users and videos.
    writer: Of the prepared data.
    config: The `recjax.data.kuairand.Config`.
  """
  if not config.feedback:
    return Feedback({}, {}, {})
  events = data.events
  log = feedback_lib.Log(
    *(np.asarray(events[name]) for name in ("user", "video", "time", "part"))
  )
  rows = np.arange(data.num_events)
  stored = np.asarray(events["stored"])
  outcome = {
    name: kuairand_features.outcome(events, rows, name).astype(bool)
    for name in ("click", "long_view", "hate", *_INTERACTIONS)
  }
  positive = np.where(stored, outcome["long_view"], outcome["click"])
  kinds = {
    "pinnacle_users": (positive, _score(events, stored, outcome, positive)),
    "negative_users": (
      ~stored & ~positive,
      feedback_lib.random_score(data.num_events, _NEGATIVE_SEED),
    ),
  }
  asking = rows[~stored]
  lists = {
    "positive_history": _write_history(
      log, positive, vocabularies, writer, config
    )
  }
  # What the released evaluation gives the negatives that it ranks.
  blind = (log.part[asking] == 2) & ~positive[asking]
  blind &= config.protocol == "released"
  for name, (chosen, score) in kinds.items():
    score = score if config.feedback == "pinnacle" else None
    users, length = feedback_lib.feedback_lists(
      log,
      chosen,
      score,
      max_len=config.feedback_len,
      rows=asking,
      protocol=config.protocol,
      sees_itself=positive & chosen,
    )
    if name == "pinnacle_users" and config.pseudo_neighbors:
      users, length = pseudo_feedback.fill(
        log,
        chosen,
        score,
        users,
        length,
        kuairand_features.tag_indicators(data),
        config.pseudo_neighbors,
        rows=asking,
      )
    ids = np.where(blind[:, None], 1, vocabularies.user_rows(users))
    held = np.arange(config.feedback_len) < length[:, None]
    first = writer.append_values(name, ids[held])
    lists[name] = _spread(
      data.num_events, asking, first + np.cumsum(length) - length, length
    )
  counts = causal.visible_sums(
    log.item,
    log.time,
    log.part,
    np.stack([np.ones(data.num_events), positive], axis=1).astype(np.int64),
    max_rows=data.max_rows,
  )
  return Feedback(
    lists,
    {
      name: (feedback_lib.bucket(counts[:, i]) + 1).astype(np.int32)
      for i, name in enumerate(_BUCKETS)
    },
    {name: pa.array(feedback_lib.BUCKET_NAMES) for name in _BUCKETS},
  )


def _score(events, stored, outcome, positive) -> np.ndarray:
  stay = np.where(stored, np.nan, np.asarray(events["play_ms"]) / 1000)
  interaction = sum(outcome[name].astype(float) for name in _INTERACTIONS)
  interaction -= outcome["hate"]
  training = positive & ~stored & (np.asarray(events["part"]) == 0)
  return feedback_lib.pinnacle_score(
    np.log1p(stay), np.where(stored, np.nan, interaction), training
  )


def _write_history(log, positive, vocabularies, writer, config):
  held, start, length = feedback_lib.history_slices(
    log, positive, protocol=config.protocol
  )
  video = vocabularies.video_rows(log.item[held])
  first = writer.append_values("positive_history", video)
  return first + start, length.astype(np.int32)


def _spread(num_rows: int, rows, starts, lengths):
  """Columns over all rows from those of some."""
  start, length = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int32)
  start[rows], length[rows] = starts, lengths
  return start, length
