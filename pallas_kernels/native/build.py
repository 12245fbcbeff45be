"""Builds the C++ kernels with the compiler of this machine, once.

An operator's source is `<operator>/cpu.cc`. It is compiled at its first use,
for the very processor that it runs on, into a cache: `PALLAS_KERNELS_CACHE`,
or `pallas_kernels` in the user's cache folder. The library's name there holds
a hash of all that it depends on: sources, flags, compiler, jaxlib and
processor. Two processes that want the same one build it once.

`CXX` names another compiler and `PALLAS_KERNELS_CXXFLAGS` adds flags, such as
those of a sanitizer.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jaxlib

_ROOT = pathlib.Path(__file__).parents[1]
_HEADERS = tuple(sorted(pathlib.Path(__file__).parent.glob("*.h")))
_COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: it would break the order of NaN and infinities. Products may
# be contracted into fused multiply-adds.
_FLAGS = (
  *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast"),
  # Nobody asks why a square root failed; GCC vectorises it only without.
  "-fno-math-errno",
  *("-fPIC", "-shared", "-pthread"),
)
# Handlers that each source defines; an operator `x` has at least `x`.
HANDLERS = {
  "top_k": ("top_k",),
  "product_key_topk": (
    "product_key_topk",
    "product_key_topk_grad",
    "product_key_lookup",
    "product_key_lookup_grad",
  ),
  "sparse_gather": (
    "sparse_gather",
    "sparse_gather_gated",
    "sparse_gather_weights_grad",
    "sparse_gather_row_grads",
  ),
  "row_update": ("row_update",),
}


def target(handler: str) -> str:
  """Name of a handler for `jax.ffi.ffi_call`."""
  return f"pallas_kernels.{handler}"


def require(operator: str) -> None:
  """Builds and registers the kernels of an operator.

  Raises:
    NotImplementedError: If they cannot run here, with the reason.
  """
  reason = missing(operator)
  if reason is not None:
    raise NotImplementedError(f"{operator}: no C++ kernel, for {reason}")


@functools.cache
def missing(operator: str) -> str | None:
  """Why the kernels of an operator cannot run here; None if they can."""
  compiler = _compiler()
  if compiler is None:
    return "there is no C++ compiler (install g++ or clang++, or set CXX)"
  source = _ROOT / operator / "cpu.cc"
  try:
    library = ctypes.CDLL(str(_build(source, compiler)))
  except subprocess.CalledProcessError as error:
    return f"{compiler} failed: {_first_error(error.stderr)}"
  except OSError as error:
    return f"its library cannot be made or loaded: {error}"
  for handler in HANDLERS[operator]:
    jax.ffi.register_ffi_target(
      target(handler),
      jax.ffi.pycapsule(getattr(library, handler)),
      platform="cpu",
    )
  return None


def cache_folder() -> pathlib.Path:
  """Where built libraries lie."""
  folder = os.environ.get("PALLAS_KERNELS_CACHE")
  if folder:
    return pathlib.Path(folder).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(base).expanduser() / "pallas_kernels"


def _compiler() -> str | None:
  named = os.environ.get("CXX")
  if named:
    return shutil.which(named)
  found = (shutil.which(name) for name in _COMPILERS)
  return next((path for path in found if path), None)


def _build(source: pathlib.Path, compiler: str) -> pathlib.Path:
  """The library of a source, from the cache or built into it."""
  flags = [*_FLAGS, *os.environ.get("PALLAS_KERNELS_CXXFLAGS", "").split()]
  key = hashlib.sha256()
  for part in (
    source.read_bytes(),
    *(header.read_bytes() for header in _HEADERS),
    " ".join(flags).encode(),
    _version(compiler).encode(),
    jaxlib.__version__.encode(),
    _processor().encode(),
  ):
    key.update(part + b"\0")
  folder = cache_folder()
  folder.mkdir(parents=True, exist_ok=True)
  library = folder / f"{source.parent.name}-{key.hexdigest()[:20]}.so"
  with library.with_suffix(".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if library.exists():
      return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
      # Whole or not there at all: another process may look at any moment.
      output = pathlib.Path(scratch) / library.name
      includes = [f"-I{jax.ffi.include_dir()}", f"-I{_ROOT.parent}"]
      subprocess.run(
        [compiler, *flags, *includes, str(source), "-o", str(output)],
        check=True,
        capture_output=True,
        text=True,
      )
      output.replace(library)
  return library


@functools.cache
def _version(compiler: str) -> str:
  outcome = subprocess.run(
    [compiler, "--version"], capture_output=True, text=True, check=False
  )
  return f"{compiler} {outcome.stdout}"


@functools.cache
def _processor() -> str:
  """What `-march=native` depends on."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # Not Linux.
    return f"{platform.machine()} {platform.processor()}"
  names = ("model name", "flags", "Features", "CPU part")
  found = {line for line in lines if line.startswith(names)}
  return platform.machine() + "\n".join(sorted(found))


def _first_error(text: str) -> str:
  lines = [line for line in text.splitlines() if "error" in line.lower()]
  return (lines or text.splitlines() or ["no message"])[0].strip()
