"""The one exception that stands for a user's mistake, and how it is told."""

import difflib
from collections.abc import Mapping


class UserError(ValueError):
  """A mistake in a config, a schema or a file, told in one line.

  The message says what is wrong, where (file, column, row), what is allowed
  and what to do. The commands under `experiments/` print it without a stack
  trace and exit with code 2.
  """


class DivergedError(UserError):
  """A loss or gradient that is not finite; a sweep ranks such a run last."""


def suggest(name: str, names) -> str:
  """`; did you mean 'x'?` or the list of what is allowed."""
  names = [str(n) for n in names]
  close = difflib.get_close_matches(str(name), names, n=1)
  if close:
    return f"; did you mean {close[0]!r}?"
  return f"; known: {', '.join(names)}"


def check_keys(data, allowed, where: str) -> None:
  """Raises unless `data` is an object with none but the allowed keys."""
  if not isinstance(data, Mapping):
    raise UserError(f"{where}: must be a JSON object, got {data!r}")
  for key in data:
    if key not in allowed:
      raise UserError(f"{where}: unknown key {key!r}" + suggest(key, allowed))
