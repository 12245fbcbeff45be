"""From the mapping of a config file or command line to checked dataclasses.

Defaults live in the dataclasses and nowhere else; a key that no dataclass
knows, or a value of the wrong type, ends the run in its first second.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from recjax.errors import UserError
from recjax.schema import suggest

T = TypeVar("T")

_LEAST = {
  "embed_dim": 1,
  "mlp_dims": 1,
  "num_tokens": 1,
  "token_dim": 1,
  "num_layers": 1,
  "head_dim": 0,
  "numeric_dim": 0,
}
_DTYPES = ("float32", "bfloat16", "float16")


def build(struct: type[T], values: Any, where: str) -> T:
  """Builds the dataclass `struct` from `values`.

  Nested dataclasses take nested mappings; lists become tuples; whole numbers
  are taken for floats.

  Args:
    struct: A dataclass.
    values: A mapping, field name -> value; fields left out keep their default.
    where: The config block, for messages, such as `config.model`.

  Raises:
    UserError: For an unknown or missing key or a value of the wrong type.

  Example:
    >>> @dataclasses.dataclass
    ... class Config:
    ...   dims: tuple[int, ...] = (1,)
    >>> build(Config, {"dims": [2, 3]}, "config.model")
    Config(dims=(2, 3))
  """
  if not isinstance(values, Mapping):
    raise UserError(f"{where} must be a block of keys, got {values!r}")
  fields = {f.name: f for f in dataclasses.fields(struct)}
  for key in values:
    if key not in fields:
      raise UserError(f"unknown key {where}.{key}" + suggest(key, fields))
  hints = typing.get_type_hints(struct)
  arguments = {
    key: _convert(value, hints[key], f"{where}.{key}")
    for key, value in values.items()
  }
  for name, field in fields.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and name not in arguments:
      raise UserError(f"{where}.{name} is missing; set it")
  return struct(**arguments)


def check_network(config: Any, **least: int) -> None:
  """Checks the fields that the configs of all models share, where they exist.

  Args:
    config: The `Config` of a method file.
    **least: Least values of sizes of its own; of a tuple, of each entry.

  Raises:
    UserError: If there is no task or one twice, a size is not positive, a rate
      is not in [0, 1), or the type of the computation is unknown.
  """
  # A method of a trial has no tasks.
  tasks = getattr(config, "tasks", None)
  if tasks is not None and (not tasks or len(set(tasks)) < len(tasks)):
    raise UserError(
      f"model.tasks must name at least one label, each once, got {tasks!r}"
    )
  for name, bound in {**_LEAST, **least}.items():
    value = getattr(config, name, bound)
    for number in value if isinstance(value, tuple) else (value,):
      if not bound <= number < math.inf:
        raise UserError(f"model.{name} must be at least {bound}, got {value}")
  for name in ("mlp_ratio", "embed_init_scale"):
    if not 0 < getattr(config, name, 1.0) < math.inf:
      raise UserError(
        f"model.{name} must be above 0 and finite, got {getattr(config, name)}"
      )
  if not 0 <= config.dropout_rate < 1:
    raise UserError(
      f"model.dropout_rate must lie in [0, 1), got {config.dropout_rate}"
    )
  if config.dtype not in _DTYPES:
    raise UserError(
      f"unknown model.dtype {config.dtype!r}" + suggest(config.dtype, _DTYPES)
    )


def _convert(value: Any, hint: Any, where: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return build(hint, value, where)
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in arguments:
      return None
    (hint,) = (a for a in arguments if a is not type(None))
    return _convert(value, hint, where)
  if origin is tuple:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
      raise UserError(f"{where} must be a list, got {value!r}")
    item = arguments[0]
    return tuple(_convert(v, item, where) for v in value)
  if origin is not None:
    hint = origin
  if hint is Any:
    return value
  if hint is float and type(value) is int:
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise UserError(
      f"{where} must be of type {getattr(hint, '__name__', hint)}, got "
      f"{value!r}"
    )
  return value
