"""What a data set holds: features, labels, roles and split.

A `Schema` is written by an adapter (`recjax.data.kuairand`) or read from the
JSON file that describes a user's own table (`recjax.data.table`):

```json
{
  "features": {
    "user_id": {"kind": "sparse"},
    "price":   {"kind": "dense"},
    "genres":  {"kind": "sparse", "multi": true, "separator": "|"},
    "history": {"kind": "sequence", "vocabulary": "item_id", "max_len": 50,
                "separator": " ", "time": "history_time",
                "side": {"history_author": "author_id"}},
    "content": {"kind": "vector", "dim": 64}
  },
  "labels": {"click": "binary", "play_time": {"kind": "real", "unit": "s"}},
  "roles":  {"user": "user_id", "item": "item_id", "time": "timestamp",
             "query": null, "group": "user_id", "scenario": null},
  "split":  {"by": "time", "column": "timestamp", "valid": 0.1, "test": 0.1}
}
```

Once the data is prepared the schema also knows `vocab_sizes`: the number of
embedding rows of each vocabulary. Row 0 of a vocabulary stands for every
value that the training part does not hold (out of vocabulary).

A sequence may name what else is known of its events, one value an event:
`time`, the column of their times, which `Batch.event_age` counts back from
the example's own (`roles.time`); and `side`, columns of ids. Each side column
is an id feature of its own (`Schema.sides`), so that a model that knows
nothing of sides reads it as one more sequence.

A randomised trial has a block `trial`, and may do without labels: see
`recjax.trial`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from recjax.errors import UserError, check_keys, suggest
from recjax.trial import Trial

# Name in `vocab_sizes` of the subwords that all text features share.
TOKENS = "<tokens>"
KINDS = ("sparse", "dense", "sequence", "text", "image", "vector")
LABEL_KINDS = ("binary", "real")
ROLES = ("user", "item", "time", "query", "group", "scenario")
SPLITS = ("train", "valid", "test")
SPLIT_RULES = ("time", "column", "random")


@dataclasses.dataclass(frozen=True)
class Feature:
  """One input column.

  Attributes:
    name: Column name.
    kind: One of `KINDS`.
    multi: Sparse only: each example holds a set of values.
    separator: Splits a string into values; None for list columns.
    vocabulary: Sequence and sparse: the feature whose vocabulary is shared;
      None means the feature's own.
    max_len: Longest kept sequence, set or text in tokens (a sequence keeps its
      last values, the others their first).
    buckets: Sparse: hash values into so many rows instead of a vocabulary.
    dim: Vector: its width.
    time: Sequence: column with the time of each event.
    side: Sequence: side column -> the sparse feature whose vocabulary it
      shares. It holds one value for each event of the sequence.
  """

  name: str
  kind: str
  multi: bool = False
  separator: str | None = None
  vocabulary: str | None = None
  max_len: int | None = None
  buckets: int | None = None
  dim: int | None = None
  time: str | None = None
  side: Mapping[str, str] | None = None

  @property
  def is_id(self) -> bool:
    """True for features that read rows of an embedding table."""
    return self.kind in ("sparse", "sequence")

  @property
  def is_list(self) -> bool:
    """True for features with several ids an example, which carry a mask."""
    return self.kind in ("sequence", "text") or self.multi

  @property
  def vocab(self) -> str:
    """Name of the vocabulary that the ids or tokens belong to."""
    return TOKENS if self.kind == "text" else self.vocabulary or self.name


@dataclasses.dataclass(frozen=True)
class Label:
  """One outcome: `binary` (0 or 1) or `real` in `unit`; missing is masked."""

  name: str
  kind: str = "binary"
  unit: str | None = None


@dataclasses.dataclass(frozen=True)
class Roles:
  """Columns with a meaning to metrics and methods; None where unused.

  `group` is what GAUC groups by (by default the user), `query` what QAUC
  groups by (one query, request or ranked page). `popularity` is a sparse
  feature whose row is 1 plus the bucket that `recjax.data.feedback.bucket`
  puts the item into; with it metrics are told apart for cold and warm items.
  """

  user: str | None = None
  item: str | None = None
  time: str | None = None
  query: str | None = None
  group: str | None = None
  scenario: str | None = None
  popularity: str | None = None


@dataclasses.dataclass(frozen=True)
class Split:
  """How rows are parted into training, validation and test.

  Attributes:
    by: `time` (the last `test` share of rows in time order is the test part,
      the share before it validation), `column` (a column that holds train,
      valid or test) or `random` (seeded).
    column: The time or split column.
    valid: Share of validation rows, in (0, 1).
    test: Share of test rows, in (0, 1).
    seed: Seed of a random split.
    fold: Of a random split: which rows are the test part. Where `test` is a
      fifth, folds 0 to 4 hold every row once; so for any such share.
  """

  by: str = "random"
  column: str | None = None
  valid: float = 0.1
  test: float = 0.1
  seed: int = 0
  fold: int = 0


@dataclasses.dataclass(frozen=True)
class Schema:
  """Everything a model needs to know about a data set.

  Example:
    >>> schema = Schema(
    ...     features=(Feature("item_id", "sparse"), Feature("price", "dense")),
    ...     labels=(Label("click"),),
    ...     vocab_sizes={"item_id": 100},
    ... )
    >>> [feature.name for feature in schema.id_features]
    ['item_id']
  """

  features: tuple[Feature, ...]
  labels: tuple[Label, ...]
  roles: Roles = Roles()
  split: Split = Split()
  vocab_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  trial: Trial | None = None

  @property
  def id_features(self) -> tuple[Feature, ...]:
    """Features that read embedding rows, in the schema's order.

    The sides of a sequence come right after it.
    """
    return tuple(
      feature
      for declared in self.features
      if declared.is_id
      for feature in (declared, *self.sides(declared))
    )

  @property
  def sequences(self) -> tuple[Feature, ...]:
    """Sequence features that are no side of another one."""
    return tuple(f for f in self.features if f.kind == "sequence")

  def sides(self, feature: Feature) -> tuple[Feature, ...]:
    """The side columns of a sequence, each a sequence feature of its own.

    Position by position they are aligned with it: same mask, same length.

    Example:
      >>> author = Feature("author_id", "sparse")
      >>> watched = Feature(
      ...     "watched", "sequence", vocabulary="video_id", max_len=9,
      ...     side={"watched_author": "author_id"})
      >>> schema = Schema((author, watched), (Label("click"),))
      >>> [side.name for side in schema.sides(watched)]
      ['watched_author']
    """
    return tuple(
      Feature(
        name,
        "sequence",
        separator=feature.separator,
        vocabulary=vocabulary,
        max_len=feature.max_len,
      )
      for name, vocabulary in (feature.side or {}).items()
    )

  @property
  def dense_features(self) -> tuple[Feature, ...]:
    """Real-valued columns, in the order of `Batch.dense`."""
    return tuple(f for f in self.features if f.kind == "dense")

  @property
  def vector_features(self) -> tuple[Feature, ...]:
    """Columns that hold a vector an example."""
    return tuple(f for f in self.features if f.kind == "vector")

  @property
  def text_features(self) -> tuple[Feature, ...]:
    """Columns of raw text, in the order of the schema."""
    return tuple(f for f in self.features if f.kind == "text")

  @property
  def num_scenarios(self) -> int:
    """Number of scenario ids; 1 where the data has no scenarios."""
    if self.roles.scenario is None:
      return 1
    return self.vocab_sizes[self.feature(self.roles.scenario).vocab]

  def feature(self, name: str) -> Feature:
    """The feature, or side of a sequence, called `name`."""
    known = {
      feature.name: feature
      for declared in self.features
      for feature in (declared, *self.sides(declared))
    }
    if name in known:
      return known[name]
    raise UserError(f"unknown feature {name!r}" + suggest(name, known))

  def label(self, name: str) -> Label:
    """The label called `name`."""
    for label in self.labels:
      if label.name == name:
        return label
    names = [label.name for label in self.labels]
    raise UserError(f"unknown label {name!r}" + suggest(name, names))

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON data; `from_dict` reads it back."""
    return {
      "features": {f.name: _without_defaults(f) for f in self.features},
      "labels": {v.name: {"kind": v.kind, "unit": v.unit} for v in self.labels},
      "roles": dataclasses.asdict(self.roles),
      "split": dataclasses.asdict(self.split),
      "vocab_sizes": dict(self.vocab_sizes),
      "trial": None if self.trial is None else self.trial.to_dict(),
    }

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], where: str = "schema"):
    """Reads and checks the JSON form; `where` names the file in errors."""
    check_keys(data, [field.name for field in dataclasses.fields(cls)], where)
    trial = data.get("trial")
    for key in ("features", "labels"):
      if trial is not None and key == "labels" and not data.get(key):
        continue
      if not isinstance(data.get(key), Mapping) or not data[key]:
        raise UserError(
          f'{where}: "{key}" must be an object with at least one entry'
        )
    features = tuple(
      _read_feature(name, entry, where)
      for name, entry in data["features"].items()
    )
    labels = tuple(
      _read_label(name, entry, where)
      for name, entry in (data.get("labels") or {}).items()
    )
    sizes = data.get("vocab_sizes", {})
    if not isinstance(sizes, Mapping):
      raise UserError(
        f'{where}: "vocab_sizes" must be an object, got {sizes!r}; leave it '
        "out: preparing the data fills it in"
      )
    schema = cls(
      features=features,
      labels=labels,
      roles=_read_struct(Roles, data.get("roles", {}), f"{where}: roles"),
      split=_read_struct(Split, data.get("split", {}), f"{where}: split"),
      vocab_sizes=dict(sizes),
      trial=trial and Trial.from_dict(trial, f"{where}: trial"),
    )
    _check(schema, where)
    return schema

  @classmethod
  def from_file(cls, path: epath.PathLike):
    """Reads a schema file; every mistake is a `UserError` that names it."""
    path = epath.Path(path).expanduser()
    if not path.is_file():
      raise UserError(f"{path}: no such schema file; give its path")
    try:
      data = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
      raise UserError(f"{path}: must hold a JSON object")
    return cls.from_dict(data, where=str(path))


def _without_defaults(feature: Feature) -> dict[str, Any]:
  default = Feature(name=feature.name, kind=feature.kind)
  entry = {"kind": feature.kind}
  for field in dataclasses.fields(Feature):
    value = getattr(feature, field.name)
    if field.name not in ("name", "kind") and value != getattr(
      default, field.name
    ):
      entry[field.name] = dict(value) if field.name == "side" else value
  return entry


def _read_struct(struct, data, where: str):
  fields = {f.name: f for f in dataclasses.fields(struct)}
  check_keys(data, fields, where)
  for key, value in data.items():
    kind = fields[key].type
    if kind is float and isinstance(value, int) and value is not True:
      value = float(value)
    if not isinstance(value, kind) or (kind is int and value is True):
      expected = getattr(kind, "__name__", str(kind))
      raise UserError(f"{where}: {key} must be {expected}, got {value!r}")
  return struct(**data)


def _read_feature(name: str, entry, where: str) -> Feature:
  where = f"{where}: feature {name!r}"
  if isinstance(entry, Mapping) and "kind" not in entry:
    raise UserError(f'{where}: "kind" is missing; one of {", ".join(KINDS)}')
  if isinstance(entry, Mapping) and "name" in entry:
    raise UserError(f"{where}: unknown key 'name'; the key is the name")
  if isinstance(entry, Mapping) and entry["kind"] not in KINDS:
    raise UserError(
      f"{where}: unknown kind {entry['kind']!r}" + suggest(entry["kind"], KINDS)
    )
  check_keys(entry, [f.name for f in dataclasses.fields(Feature)], where)
  feature = _read_struct_feature(name, entry, where)
  for key in ("max_len", "buckets", "dim"):
    value = getattr(feature, key)
    if value is not None and value < 1:
      raise UserError(f"{where}: {key} must be at least 1, got {value}")
  if feature.kind == "vector" and feature.dim is None:
    raise UserError(f'{where}: a vector needs "dim", its width')
  if feature.kind in ("sequence", "text") and feature.max_len is None:
    raise UserError(f'{where}: a {feature.kind} needs "max_len"')
  if feature.multi and feature.kind != "sparse":
    raise UserError(f'{where}: "multi" is for sparse features')
  for key in ("time", "side"):
    if getattr(feature, key) is not None and feature.kind != "sequence":
      raise UserError(f'{where}: "{key}" is for sequences')
  return feature


def _read_struct_feature(name: str, entry, where: str) -> Feature:
  types = {f.name: f.type for f in dataclasses.fields(Feature)}
  for key, value in entry.items():
    if key == "side":
      ok = isinstance(value, Mapping) and all(
        isinstance(vocabulary, str) for vocabulary in value.values()
      )
    else:
      ok = isinstance(value, types[key])
      if types[key] is not bool and value is True:
        ok = False
    if not ok:
      raise UserError(f"{where}: {key} has the wrong type: {value!r}")
  return Feature(name=name, **entry)


def _read_label(name: str, entry, where: str) -> Label:
  where = f"{where}: label {name!r}"
  if isinstance(entry, str):
    entry = {"kind": entry}
  check_keys(entry, ("kind", "unit"), where)
  if entry.get("kind") not in LABEL_KINDS:
    raise UserError(
      f"{where}: kind must be binary or real, got {entry.get('kind')!r}"
    )
  return Label(name=name, kind=entry["kind"], unit=entry.get("unit"))


def _check(schema: Schema, where: str):
  names = [f.name for f in schema.features]
  for label in schema.labels:
    if label.name in names:
      raise UserError(
        f"{where}: {label.name!r} is a feature and a label; a label must not "
        "be an input"
      )
  for column in schema.trial.columns if schema.trial else ():
    # What is known of people from before may well tell the clusters.
    if column in names and column != schema.trial.cluster:
      raise UserError(
        f"{where}: trial: {column!r} is a feature too; what a trial draws and "
        "sees must not be an input"
      )
  for feature in schema.features:
    for target in (feature.vocabulary, *(feature.side or {}).values()):
      if target is None:
        continue
      if target not in names or schema.feature(target).kind != "sparse":
        sparse = [f.name for f in schema.features if f.kind == "sparse"]
        raise UserError(
          f"{where}: feature {feature.name!r} shares the vocabulary of "
          f"{target!r}, which is no sparse feature" + suggest(target, sparse)
        )
      if schema.feature(target).vocab != target:
        raise UserError(
          f"{where}: feature {feature.name!r}: {target!r} has no vocabulary "
          f"of its own; name {schema.feature(target).vocab!r}"
        )
  _check_events(schema, where)
  for role in ("scenario", "popularity"):
    name = getattr(schema.roles, role)
    if name is None:
      continue
    if name not in names:
      raise UserError(
        f"{where}: roles: {role} {name!r} is no feature" + suggest(name, names)
      )
    feature = schema.feature(name)
    if feature.kind != "sparse" or feature.multi:
      raise UserError(
        f"{where}: roles: {role} {name!r} must be a single-valued sparse "
        "feature"
      )
  split = schema.split
  if split.by not in SPLIT_RULES:
    raise UserError(
      f"{where}: split: unknown rule {split.by!r}"
      + suggest(split.by, SPLIT_RULES)
    )
  if not 0 <= split.seed < 2**63:
    raise UserError(
      f"{where}: split: seed must be from 0 to {2**63 - 1}, got {split.seed}"
    )
  folds = max(1, round(1 / split.test)) if split.test > 0 else 1
  if not 0 <= split.fold < (folds if split.by == "random" else 1):
    raise UserError(
      f"{where}: split: fold must be from 0 to {folds - 1} for a random split "
      f"with test {split.test}, and 0 for others, got {split.fold}"
    )
  if split.by in ("time", "column") and split.column is None:
    raise UserError(f'{where}: split by {split.by} needs "column"')
  if split.by != "column" and not (
    0 < split.valid < 1 and 0 < split.test < 1 and split.valid + split.test < 1
  ):
    raise UserError(
      f"{where}: split: valid ({split.valid}) and test ({split.test}) must "
      "be shares in (0, 1) that leave rows for training"
    )


def _check_events(schema: Schema, where: str):
  """Checks what sequences say of the times and sides of their events."""
  taken = {f.name: "a feature" for f in schema.features}
  taken |= {label.name: "a label" for label in schema.labels}
  for feature in schema.sequences:
    place = f"{where}: feature {feature.name!r}"
    if feature.time is not None:
      if schema.roles.time is None:
        raise UserError(
          f'{place}: "time" needs the time of the example itself; name its '
          'column as "time" of "roles"'
        )
      if feature.time in taken:
        raise UserError(
          f"{place}: time {feature.time!r} is {taken[feature.time]} already; "
          "name a column that holds nothing but the times of the events"
        )
    for side in feature.side or {}:
      if side in taken or side == feature.time:
        raise UserError(
          f"{place}: side {side!r} is {taken.get(side, 'its time')} already; "
          "a side column is a feature of its own"
        )
      taken[side] = f"a side of {feature.name!r}"
