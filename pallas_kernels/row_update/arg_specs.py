"""Shapes of `row_update` in use: (shape of the table, shape of the ids)."""

ARG_SPECS = {
  # Memory values of MSN, read by 8 tokens x 512 examples x 16 slots.
  "msn_base": ((64**2, 64), (8 * 512, 16)),
  "msn_paper": ((256**2, 1024), (16 * 2048, 32)),
  # Bags of 32 rows.
  "bags_1e6": ((10**6, 64), (4096, 32)),
  "bags_1e6_128": ((10**6, 128), (4096, 32)),
  "bags_1e7": ((10**7, 64), (4096, 32)),
}
