"""One file a planted claim: its law, and its control; see `synthetic`."""
