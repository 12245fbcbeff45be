"""What the GPU kernels of several operators share."""
