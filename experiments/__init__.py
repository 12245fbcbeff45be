"""Commands: thin doors to the library."""
