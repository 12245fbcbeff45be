"""Shapes of `top_k` in use: (shape of x, k)."""

ARG_SPECS = {
  # One axis of the keys of MSN: tokens x batch x heads rows.
  "msn_base": ((8 * 512, 64), 16),
  "msn_paper": ((16 * 2048, 256), 32),
  # Candidates of a retrieval.
  "rows_512x256": ((512, 256), 32),
  "rows_4096x1024": ((4096, 1024), 32),
  "rows_4096x65536": ((4096, 65536), 32),
}
