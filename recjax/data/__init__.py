"""Data sets: one adapter a file, the prepared store and the input pipeline.

`recjax.data.<name>` is an adapter, found by import: `table` reads anyone's
Parquet or CSV file with a schema file, the others read one public data set
each. An adapter module offers

* `VERSION`: an integer, raised when what `prepare` writes changes;
* `Config`: a frozen dataclass of its options;
* `sources(config) -> list of paths`: the files it reads;
* `prepare(config, directory)`: writes the data set with
  `recjax.data.columns.ColumnWriter`, in bounded memory;
* optionally `estimate_bytes(config)`: the disk that this needs (by default
  three times the sources).

`recjax.data.pipeline.open_dataset` prepares a data set once, keeps it in a
cache folder, and opens it as `recjax.data.columns.Columns`;
`recjax.data.pipeline.make_loader` turns that into shuffled batches.
"""
