"""One sweep a published table: `get_sweep()` returns a `recjax.sweep.Sweep`."""
