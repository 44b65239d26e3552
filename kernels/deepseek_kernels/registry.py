"""Ops with explicit backends: one schema, one fake, one implementation a backend, none of them chosen in here."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from deepseek_kernels.machine import BackendUnavailable, interpreting, why_not

BACKENDS = ("reference", "triton", "torch", "cuda", "ext")
_LIBRARY = torch.library.Library("deepseek_kernels", "FRAGMENT")


def define(
    package: str, schema: str, fake: Callable[..., Any], backends: tuple[str, ...]
) -> Callable[..., Any]:
    """Registers an op ``deepseek_kernels::NAME``. ``schema``: ``NAME(Tensor x, ..., *, str backend) -> ...``.

    The implementation of a backend is the function NAME of ``{package}.{backend}_impl`` (of ``{package}.reference``
    for the reference), which takes the arguments of the schema without ``backend``. It is imported when first used:
    Triton is no condition for importing this package.
    """
    name = schema.partition("(")[0]

    def run(*args: Any, backend: str, **kwargs: Any) -> Any:
        return _implementation(package, name, backend, backends)(*args, **kwargs)

    def faked(*args: Any, backend: str, **kwargs: Any) -> Any:
        return fake(*args, **kwargs)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deepseek_kernels::{name}", faked, lib=_LIBRARY)
    return getattr(torch.ops.deepseek_kernels, name).default


@cache
def _implementation(package: str, name: str, backend: str, backends: tuple[str, ...]) -> Callable[..., Any]:
    if backend not in backends:
        raise BackendUnavailable(f"{name}: there is no backend {backend!r}; there are {', '.join(backends)}")
    reason = why_not(backend)
    if reason is not None:
        sure = [one for one in ("reference", "triton", "cuda") if one in backends and why_not(one) is None]
        raise BackendUnavailable(
            f"{name}: backend {backend!r} cannot run here: {reason}. Use {' or '.join(sure)}"
        )
    if backend == "triton" and interpreting():
        importlib.import_module(
            "deepseek_kernels.interpreter"
        ).install()  # stock, it is wrong for BF16 and FP8
    module = "reference" if backend == "reference" else f"{backend}_impl"
    return getattr(importlib.import_module(f"{package}.{module}"), name)
