"""What a model is judged by: ranking, calibration and error of predictions.

Every metric is a pure function `(predictions, labels, *, mask=None)`. Shared
by all of them:

* NumPy arrays are computed in NumPy in float64: evaluation gathers scores on
  the host and uses this. JAX arrays (and tracers under `jax.jit`) are computed
  on the device in float32, with sums arranged to keep the error near 1e-7.
* `labels` are 0 or 1 unless a function says otherwise; `mask` is True where an
  example counts, None means everywhere. What is masked out may hold anything,
  NaN included.
* A value that the examples do not define (no example, one class only) is NaN,
  never a made-up number. NaN among counted predictions gives NaN.
"""
