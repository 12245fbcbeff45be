"""Runs TPU kernels without a TPU and looks at what they do to its memory."""

import contextlib
import functools
from unittest import mock

from absl.testing import parameterized
from jax._src.pallas.mosaic.interpret import (
  interpret_pallas_call as interpreter,
)
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch


class TpuCase(parameterized.TestCase):
  """Tests in the TPU interpreter: no race, nothing read out of bounds."""

  def setUp(self):
    super().setUp()
    # Copies happen when they are waited for, new memory holds NaN, and a read
    # out of bounds raises; a race is printed, or raises in newer versions.
    params = pltpu.InterpretParams(detect_races=True)
    self.enter_context(dispatch.use("pallas_tpu", interpret=params))

  def tearDown(self):
    # A kernel that ran leaves its verdict behind.
    if interpreter.races is not None:
      self.assertFalse(interpreter.races.races_found, "a race between copies")
    super().tearDown()


@contextlib.contextmanager
def hbm_traffic():
  """Bytes that the kernels traced and run inside read and write in HBM.

  Yields:
    A dict with the bytes so far as `read` and `written`.
  """
  bytes_moved = {"read": 0, "written": 0}

  def is_hbm(memory_space):
    return interpreter.TPU_MEMORY_SPACE_NAMES[int(memory_space)] in (
      "any",
      "hbm",
    )

  def counting(fn, count, name):
    # Copies call what is below the layer that reports errors of callbacks.
    @functools.wraps(fn.__wrapped__)
    def by_copy(*args, **options):
      result = fn.__wrapped__(*args, **options)
      count(args, result)
      return result

    # The grid's blocks have names; results that go home have none.
    @functools.wraps(by_copy)
    def by_grid(*args, **options):
      run = by_copy if name in options else fn.__wrapped__
      return run(*args, **options)

    return by_grid

  def count_read(args, result):
    if is_hbm(args[3]):
      bytes_moved["read"] += result[1].nbytes

  def count_written(args, _):
    if is_hbm(args[3]):
      bytes_moved["written"] += args[6].nbytes

  with (
    mock.patch.object(
      interpreter, "get", counting(interpreter.get, count_read, "input_name")
    ),
    mock.patch.object(
      interpreter,
      "store",
      counting(interpreter.store, count_written, "output_name"),
    ),
  ):
    yield bytes_moved
