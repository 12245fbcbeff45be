"""How every command ends: a user's mistake is one line and exit code 2."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from recjax.errors import UserError


def run(main: Callable[[Sequence[str]], None]) -> None:
  """`app.run(main)`, with the mistakes of users told in one line."""

  def guarded(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.INFO)
    try:
      if len(argv) > 1:
        raise UserError(
          f"unexpected argument {argv[1]!r}; options look like --name=value"
        )
      main(argv)
    except UserError as error:
      _fail(error)

  app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  try:
    return flags.FLAGS(argv)
  except (flags.Error, UserError) as error:
    _fail(error)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    # What ml_collections raises for an unknown key or a value of a wrong type.
    _fail(error)
  except (OSError, ImportError, SyntaxError) as error:
    _fail(f"--config: cannot be read ({error})")


def _fail(error: object) -> None:
  text = " ".join(str(getattr(error, "args", [error])[0] or error).split())
  print(f"error: {text}", file=sys.stderr, flush=True)
  sys.exit(2)
