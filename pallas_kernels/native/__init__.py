"""C++ kernels for the CPU: how they are built, and what they share."""
