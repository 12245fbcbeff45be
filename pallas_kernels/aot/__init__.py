"""Compilers of accelerators, run on a machine that has none.

`tpu` and `cuda` compile a function, `cases` are the operators at the shapes in
use, `report` writes down what the compilers say of them.
"""
