"""Shapes of `sparse_gather` in use: (table, indices)."""

ARG_SPECS = {
  # One memory of MSN: tokens x batch reads of k slots.
  "msn_base": ((4096, 64), (8, 512, 16)),
  "msn_paper": ((65536, 1024), (16, 2048, 32)),
  # A bag of ids of one feature.
  "bag_64": ((1_000_000, 64), (4096, 32)),
  "bag_128": ((1_000_000, 128), (4096, 32)),
}
