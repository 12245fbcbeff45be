"""Which implementation of an operator runs.

Every operator has named implementations: `reference`, the definition in plain
JAX; `xla`, the same for speed, which runs everywhere; and kernels: `cpu` in
C++, `pallas_tpu`, `pallas_gpu` and `mosaic_gpu` in Pallas, `jax_triton` in
Triton. `implementation=None` takes what `DEFAULTS` names for the platform that
the program is compiled for, and else `xla`; what is named runs or raises
`NotImplementedError` with the reason.

`use` takes the place of None for all that is traced inside it:

    with dispatch.use("xla"):
      exported = jax.export.export(jax.jit(fn))(x)
"""

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from absl import logging

from pallas_kernels.native import build

# What stands for None, by platform and operator. An entry is here where a
# measurement, or for an accelerator the compiler's own report, is better than
# XLA's: see README.md beside this file.
DEFAULTS: Mapping[str, Mapping[str, str]] = {
  "cpu": {
    "top_k": "cpu",
    "product_key_topk": "cpu",
    "sparse_gather": "cpu",
    "row_update": "cpu",
  },
  "tpu": {
    "top_k": "pallas_tpu",
    "product_key_topk": "pallas_tpu",
    "sparse_gather": "pallas_tpu",
    "row_update": "pallas_tpu",
  },
  "gpu": {
    "top_k": "jax_triton",
    "product_key_topk": "jax_triton",
    "sparse_gather": "pallas_gpu",
    "row_update": "pallas_gpu",
  },
}
_PLATFORMS = {
  "pallas_tpu": "tpu",
  "pallas_gpu": "gpu",
  "mosaic_gpu": "gpu",
  "jax_triton": "gpu",
}


class Choice(NamedTuple):
  """What `use` says."""

  implementation: str | None = None
  platform: str | None = None
  interpret: Any = False


_BEST = Choice()
_CHOICE: contextvars.ContextVar[Choice] = contextvars.ContextVar(
  "pallas_kernels_choice", default=_BEST
)


@contextlib.contextmanager
def use(
  implementation: str | None,
  *,
  platform: str | None = None,
  interpret: Any = False,
) -> Iterator[None]:
  """What `implementation=None` means for all that is traced in this block.

  A function that `jit` has compiled before keeps what it was compiled with.
  `use("xla")` is for programs that leave the machine (it has no custom calls),
  and for arrays spread over devices by the compiler, which cannot cut a
  kernel's call into parts.

  Args:
    implementation: A name, or None for the best of the platform.
    platform: `cpu`, `tpu` or `gpu`, for a program that is compiled for a
      machine other than this one; None is the platform of this process.
    interpret: What `pallas_call` takes under this name: runs Pallas kernels
      without their device, to look for errors.
  """
  token = _CHOICE.set(Choice(implementation, platform, interpret))
  try:
    yield
  finally:
    _CHOICE.reset(token)


def resolve(implementation: str | None) -> Choice:
  """What is asked for here, or by `use`; call it at the door.

  The rules of a gradient are traced later, perhaps outside of the `use` that
  the call was in.
  """
  choice = _CHOICE.get()
  if implementation is None:
    return choice
  return choice._replace(implementation=implementation)


def interpret_mode() -> Any:
  """For `pallas_call(interpret=...)` of a kernel that `run` calls."""
  return _CHOICE.get().interpret


def lazy(module: str, function: str) -> Callable[..., Any]:
  """A function of a module that is imported when it is called first.

  Pallas takes seconds to import, and most processes need none of it.
  """

  def call(*arrays, **options):
    return getattr(importlib.import_module(module), function)(
      *arrays, **options
    )

  return call


def run(
  operator: str,
  implementations: Mapping[str, Callable[..., Any]],
  choice: Choice,
  *arrays: jax.Array,
  **options: Any,
) -> Any:
  """Calls one implementation of an operator.

  Args:
    operator: Its name, for messages, `DEFAULTS`, and of its C++ source.
    implementations: Name -> function of `*arrays` and `**options`. A kernel
      raises `NotImplementedError` for what it cannot do.
    choice: From `resolve`.
    *arrays: Arrays, which the gradient and `vmap` rules have seen to.
    **options: Static.

  Raises:
    NotImplementedError: If the named one cannot run here, with the reason.
    ValueError: If there is none of this name.
  """
  token = _CHOICE.set(choice)
  try:
    run_fn = _run_default if choice.implementation is None else _run_named
    return run_fn(operator, implementations, choice, arrays, options)
  finally:
    _CHOICE.reset(token)


def _run_named(operator, implementations, choice, arrays, options):
  name = choice.implementation
  if name not in implementations:
    raise ValueError(
      f"{operator}: unknown implementation {name!r}; there are "
      + ", ".join(implementations)
    )
  here = choice.platform or jax.default_backend()
  needed = _PLATFORMS.get(name, here)
  if needed != here and not choice.interpret:
    raise NotImplementedError(
      f"{operator}: {name} needs a {needed.upper()}, and this is compiled for "
      f"{here}; see `use` to compile for another platform or to interpret"
    )
  if name == "cpu":
    build.require(operator)
  return implementations[name](*arrays, **options)


def _run_default(operator, implementations, choice, arrays, options):
  xla = functools.partial(implementations["xla"], **options)
  platform = choice.platform or jax.default_backend()
  name = DEFAULTS.get(platform, {}).get(operator, "xla")
  if name not in implementations or name == "xla":
    return xla(*arrays)
  kernel = functools.partial(implementations[name], **options)
  reason = build.missing(operator) if name == "cpu" else None
  if reason is None:
    try:
      jax.eval_shape(kernel, *arrays)
    except NotImplementedError as error:
      reason = error
  if reason is not None:
    _tell(f"{operator}: the XLA implementation runs, for {reason}")
    return xla(*arrays)
  what = "C++ kernel" if name == "cpu" else f"kernel {name}"
  _tell(f"{operator}: the {what} runs on the {platform.upper()}")
  # A program may be compiled for another platform than the machine's.
  branch = {"gpu": "cuda"}.get(platform, platform)
  return jax.lax.platform_dependent(*arrays, **{branch: kernel}, default=xla)


@functools.cache
def _tell(message: str) -> None:
  """Once a message and process."""
  logging.info("%s.", message)
