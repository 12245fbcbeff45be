"""Freed memory is kept, unless the user has said otherwise."""

import os
import subprocess
import sys

from absl.testing import absltest

SCRIPT = """
import ctypes, resource
from recjax import host_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(2**26)
  ctypes.memset(block, 1, 2**26)
  libc.free(block)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults(), faults()
is_kept = host_memory.keep_freed_memory()
faults()
print(min(first), is_kept, faults())
"""


def run(**environment):
  clean = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
  }
  output = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    env=clean | environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  return int(output[0]), output[1] == "True", int(output[2])


@absltest.skipUnless(sys.platform == "linux", "of the GNU C library")
class HostMemoryTest(absltest.TestCase):
  def test_pages_are_paid_for_once(self):
    before, is_kept, after = run()
    self.assertTrue(is_kept)
    # 64 MiB; huge pages make it fewer than one in 4 KiB.
    self.assertGreater(before, 30)
    self.assertLess(after, 5)

  def test_what_the_user_has_set_stays(self):
    before, is_kept, after = run(MALLOC_TOP_PAD_="0")
    self.assertFalse(is_kept)
    self.assertGreater(after, before // 2)


if __name__ == "__main__":
  absltest.main()
