"""Recipes, one a model; `get_config(size)` returns a ConfigDict.

It is not locked: `--config.block.key=value` may set any option of the library,
also one that a recipe leaves at its default. The library knows which keys are
none, and says so before a run begins.
"""
