"""Recipes, one a model; `get_config(size)` returns a locked ConfigDict."""
