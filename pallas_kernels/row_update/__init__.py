"""The optimiser's step on the touched rows of a table; see `api`."""
