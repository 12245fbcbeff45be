"""Industrial recommendation methods in exact, fast JAX and Flax."""
