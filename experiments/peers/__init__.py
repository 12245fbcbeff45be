"""The same models in other libraries, for benchmarks only."""
