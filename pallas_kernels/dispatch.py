"""Which implementation of an operator runs.

Every operator has named implementations: `reference`, the definition in plain
JAX; `xla`, the same for speed, which runs everywhere; and kernels, such as
`cpu`. `implementation=None` takes the kernel of the platform that the program
is compiled for, where there is one, and else `xla`; what is named runs or
raises `NotImplementedError` with the reason.

`use("xla")` takes the place of None for all that is traced inside it:

    with dispatch.use("xla"):
      exported = jax.export.export(jax.jit(fn))(x)
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging

from pallas_kernels.native import build

_DEFAULT: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  "pallas_kernels_implementation", default=None
)


@contextlib.contextmanager
def use(implementation: str | None) -> Iterator[None]:
  """What `implementation=None` means for all that is traced in this block.

  A function that `jit` has compiled before keeps what it was compiled with.
  For programs that leave the machine (`xla` has no custom calls), and for
  arrays spread over devices by the compiler, which cannot cut a kernel's call
  into parts as it does with `xla`.

  Args:
    implementation: A name, or None for the best of the platform.
  """
  token = _DEFAULT.set(implementation)
  try:
    yield
  finally:
    _DEFAULT.reset(token)


def resolve(implementation: str | None) -> str | None:
  """The implementation asked for here, or by `use`; call it at the door.

  The rules of a gradient are traced later, perhaps outside of the `use` that
  the call was in.
  """
  return _DEFAULT.get() if implementation is None else implementation


def run(
  operator: str,
  implementations: Mapping[str, Callable[..., Any]],
  implementation: str | None,
  *arrays: jax.Array,
  **options: Any,
) -> Any:
  """Calls one implementation of an operator.

  Args:
    operator: Its name, for messages, and of its C++ source.
    implementations: Name -> function of `*arrays` and `**options`. A kernel
      raises `NotImplementedError` for what it cannot do.
    implementation: From `resolve`.
    *arrays: Arrays, which the gradient and `vmap` rules have seen to.
    **options: Static.

  Raises:
    NotImplementedError: If the named one cannot run here, with the reason.
    ValueError: If there is none of this name.
  """
  if implementation is not None:
    if implementation not in implementations:
      raise ValueError(
        f"{operator}: unknown implementation {implementation!r}; there are "
        + ", ".join(implementations)
      )
    if implementation == "cpu":
      build.require(operator)
    return implementations[implementation](*arrays, **options)

  xla = functools.partial(implementations["xla"], **options)
  if "cpu" not in implementations or jax.default_backend() != "cpu":
    return xla(*arrays)
  reason = build.missing(operator)
  if reason is not None:
    _tell(f"{operator}: the XLA implementation runs, for {reason}")
    return xla(*arrays)
  cpu = functools.partial(implementations["cpu"], **options)
  try:
    jax.eval_shape(cpu, *arrays)
  except NotImplementedError as error:
    _tell(f"{operator}: the XLA implementation runs, for {error}")
    return xla(*arrays)
  _tell(f"{operator}: the C++ kernel runs on the CPU")
  # A program may be compiled for an accelerator on a machine without one.
  return jax.lax.platform_dependent(*arrays, cpu=cpu, default=xla)


@functools.cache
def _tell(message: str) -> None:
  """Once a message and process."""
  logging.info("%s.", message)
