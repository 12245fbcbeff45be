"""Weighted sums of the rows of a table that ids name; see `api`."""
