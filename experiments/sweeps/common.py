"""What the sweep files share: rows of a table from recipes."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import trees as trees_lib
from recjax.errors import UserError
from recjax.sweep import Interval, Model, with_words

Space = Mapping[str, Sequence[Any] | Interval]


def model(
  label: str,
  recipe: str,
  words: Mapping[str, Any] | None = None,
  space: Space | None = None,
) -> Model:
  """A row from a recipe.

  Args:
    label: Its name in the table.
    recipe: Module of `experiments.configs` and size, such as
      `rankmixer:base`.
    words: What differs from the recipe, such as `{"model.ffn": "gated"}`.
    space: What is tuned; see `recjax.sweep.Model`.

  Raises:
    UserError: If there is no such recipe, or a word names no block of it.
  """
  config = _recipe(label, recipe)
  return Model(label, with_words(config, words or {}), space or {})


def trees(
  label: str,
  recipe: str,
  words: Mapping[str, Any] | None = None,
  space: Space | None = None,
) -> Model:
  """A row of gradient-boosted trees on the data of a recipe.

  Their own words are `trees.num_leaves` and the like: entries of
  `experiments.trees.PARAMS`.
  """
  config = _recipe(label, recipe) | {"trees": dict(trees_lib.PARAMS)}
  return Model(
    label,
    with_words(config, words or {}),
    space or {},
    trainer="experiments.trees:train_and_evaluate",
  )


def _recipe(label: str, recipe: str) -> dict[str, Any]:
  name, _, size = recipe.partition(":")
  module = f"experiments.configs.{name}"
  try:
    found = importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name != module:
      raise
    raise UserError(
      f"{label}: there is no recipe {name!r} in experiments/configs"
    ) from error
  return found.get_config(size or "base").to_dict()
