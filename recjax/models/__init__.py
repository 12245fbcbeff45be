"""The methods, one file each.

A method file holds `Config`, `Model`, `tables`, `loss_fn` and, where it needs
them, `STAGES`, `gradient_fn` and `diagnostics`; `recjax.method` says what each
is. Files are found by their name: there is no registry.
"""
