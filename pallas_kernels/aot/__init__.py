"""Compilers of accelerators that are not there; for tests."""
