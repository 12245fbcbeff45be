"""How every command ends: a user's mistake is one line and exit code 2."""

import errno
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from recjax import host_memory
from recjax.errors import UserError
from recjax.schema import suggest

# What the machine may refuse; any other OSError is a bug and keeps its trace.
_REFUSALS = (
  errno.EACCES,
  errno.EDQUOT,
  errno.EEXIST,
  errno.EISDIR,
  errno.ENAMETOOLONG,
  errno.ENOSPC,
  errno.ENOTDIR,
  errno.EPERM,
  errno.EROFS,
)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """`app.run(main)`, with the mistakes of users told in one line."""

  def guarded(argv: Sequence[str]) -> None:
    host_memory.keep_freed_memory()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_told)
    sys.unraisablehook = _print_unraisable
    try:
      if len(argv) > 1:
        raise UserError(
          f"unexpected argument {argv[1]!r}; options look like --name=value"
        )
      main(argv)
    except UserError as error:
      _fail(error)
    except OSError as error:
      if error.errno not in _REFUSALS:
        raise
      _fail(
        f"{error.filename or 'a file'}: {error.strerror}; make room or give "
        "another folder"
      )

  app.run(guarded, flags_parser=_parse)


def _is_told(record) -> bool:
  """True for warnings and our own notes; libraries note each file they open."""
  own = pathlib.Path(__file__).parents[1]
  return record.levelno >= logging.converter.STANDARD_WARNING or pathlib.Path(
    record.pathname
  ).parent in (own / "recjax", own / "recjax/data", own / "experiments")


def _print_unraisable(args) -> None:
  """Python's own hook, but for what follows from a checkpoint's failed read.

  Reads that are still under way then find their event loop closed, and each
  would print a stack trace around the one line that says what is wrong.
  """
  if str(args.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(args)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  try:
    recipe = _check_recipe(argv)
    try:
      return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
      raise _bad_value(error, recipe) from error
    except KeyError as error:
      raise UserError(
        f"--config: the recipe is locked and lacks a key that was set "
        f"({error.args[0].split(' does not')[0]}); return it without .lock()"
      ) from error
    except SystemExit:
      sys.exit(0)  # After --help, which absl counts as a failure.
  except (UserError, flags.Error, TypeError, ValueError) as error:
    # The latter two: what ml_collections says of a value that does not fit.
    _fail(error)


def _check_recipe(argv: Sequence[str]) -> Mapping[str, Any]:
  """The recipe of `--config`, empty if there is none.

  Read here once more than by the flag itself, which keeps a missing file for
  later and tells of other mistakes in many lines.
  """
  if "config" not in flags.FLAGS:
    return {}
  value, overrides = None, []
  for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
    name, sign, given = argument.partition("=")
    if name in ("--config", "-config"):
      value = given if sign else following
    elif name.startswith(("--config.", "-config.")):
      overrides.append(name.lstrip("-").removeprefix("config."))
  if value is None:
    if overrides:
      raise UserError(
        f"--config.{overrides[0]} changes a recipe, but --config is missing; "
        "give it first, as --config=experiments/configs/msn.py:base"
      )
    return {}
  recipe = _load_recipe(value)
  for override in overrides:
    _check_override(recipe, override)
  return recipe


def _load_recipe(value: str) -> Mapping[str, Any]:
  path, colon, size = value.partition(":")
  folder = pathlib.Path(__file__).parent / "configs"
  if not pathlib.Path(path).is_file():
    raise UserError(
      f"--config: {path}: no such file; give a recipe such as "
      f"{folder.parent.name}/configs/msn.py:base"
    )
  if not path.endswith(".py"):
    raise UserError(
      f"--config: {path}: a recipe is a Python file (.py) with a function "
      "get_config(size)"
    )
  try:
    content = runpy.run_path(path)
    if "get_config" not in content:
      raise UserError(
        f"--config: {path}: defines no get_config(size); give a recipe such "
        f"as those in {folder.parent.name}/configs"
      )
    recipe = content["get_config"](*[size] if colon else ())
  except UserError:
    raise
  except Exception as error:  # A recipe is a program: anything may come of it.
    raise UserError(
      f"--config: {path}{_line_of(error, path)}: {type(error).__name__}: "
      f"{error}; correct the recipe"
    ) from error
  if not isinstance(recipe, Mapping) and not hasattr(recipe, "to_dict"):
    raise UserError(
      f"--config: {path}: get_config must return a ConfigDict, got {recipe!r}"
    )
  return recipe


def _line_of(error: Exception, path: str) -> str:
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if f.filename == path]
  if isinstance(error, SyntaxError):
    lines.append(error.lineno)
  return f", line {lines[-1]}" if lines else ""


def _check_override(recipe: Mapping[str, Any], name: str) -> None:
  """Raises unless all but the last part of `a.b.c` are blocks of the recipe.

  The last part may be an option that the recipe leaves at its default: whether
  it is one is for the library to say.
  """
  block, where = recipe, "config"
  for key in name.split(".")[:-1]:
    if key not in block:
      blocks = [k for k in block if hasattr(block[k], "to_dict")]
      raise UserError(f"unknown block {where}.{key}" + suggest(key, blocks))
    block, where = block[key], f"{where}.{key}"
    if not hasattr(block, "to_dict"):
      raise UserError(
        f"--config.{name}: {where} is the value {block!r} and holds no keys; "
        f"set --{where}=..."
      )


def _bad_value(error: Exception, recipe: Mapping[str, Any]) -> UserError:
  """Says which type an option of the recipe has."""
  match = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL)
  if match is None:
    return UserError(error)
  name, given = match.groups()
  value = recipe
  for key in name.split("."):
    value = value[key]
  if hasattr(value, "to_dict"):
    return UserError(
      f"config.{name} is a block, not a value; set one of its keys, such as "
      f"--config.{name}.{next(iter(value), '...')}=..."
    )
  return UserError(
    f"config.{name} must be of type {type(value).__name__} such as {value!r}, "
    f"got {given!r}"
  )


def _fail(error: object) -> None:
  text = " ".join(str(error).split())
  print(f"error: {text}", file=sys.stderr, flush=True)
  sys.exit(2)
