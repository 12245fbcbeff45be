"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
  """A mistake in a config, a schema or a file, told in one line.

  The message says what is wrong, where (file, column, row), what is allowed
  and what to do. The commands under `experiments/` print it without a stack
  trace and exit with code 2.
  """


class DivergedError(UserError):
  """A loss or gradient that is not finite; a sweep ranks such a run last."""
