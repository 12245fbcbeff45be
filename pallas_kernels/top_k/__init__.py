"""The k largest entries of each row; see `api`."""
