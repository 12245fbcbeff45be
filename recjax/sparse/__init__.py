"""Row-sparse tables: read, update, optimisers.

A table is a plain donated array beside the Linen parameters. A training step
costs what it touches: it gathers the rows of the batch, differentiates with
respect to those rows, sums the gradients of duplicates and writes the touched
rows back. Nothing of the table's own size is computed, copied or swept.

* `table`: declaration, initialisation, storage and the gather.
* `in_model`: tables whose ids depend on activations (memories).
* `update`: duplicates summed, optimiser applied to touched rows.

The weighted gather and the update are operators of `pallas_kernels`, where the
optimisers are defined: row-wise Adagrad, Adagrad, lazy Adam, SGD.
"""
