"""What the TPU kernels of several operators share."""
