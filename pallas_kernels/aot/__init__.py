"""Compilers of accelerators, run on a machine that has none; see `cuda`."""
