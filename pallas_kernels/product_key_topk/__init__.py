"""The best of all sums of two score vectors, and the memory search on it."""
