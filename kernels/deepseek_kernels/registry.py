"""Ops with explicit backends: one schema, one fake, one implementation a backend, none of them chosen in here."""

import importlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

BACKENDS = ("reference", "triton", "torch", "cuda", "ext")
_LIBRARY = torch.library.Library("deepseek_kernels", "FRAGMENT")


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here."""


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
        there = [one for one in backends if why_not(one) is None]
        raise BackendUnavailable(
            f"{name}: backend {backend!r} cannot run here: {reason}. Use {' or '.join(there)}"
        )
    module = "reference" if backend == "reference" else f"{backend}_impl"
    return getattr(importlib.import_module(f"{package}.{module}"), name)


def find_nvcc() -> str | None:
    """CUDA's compiler, on the PATH or where CUDA puts it."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def on_hopper() -> bool:
    """Whether the GPU is an H100, H200 or H800."""
    return torch.cuda.get_device_capability() == (9, 0)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (set before triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def why_not(backend: str) -> str | None:
    """Why ``backend`` cannot run on this machine; None: it can (single ops may lack it all the same)."""
    match backend:
        case "triton":
            try:
                importlib.import_module("triton")
            except ImportError as error:
                return f"triton is not installed ({error})"
            if not interpreting() and not torch.cuda.is_available():
                return "there is no GPU to compile for (TRITON_INTERPRET=1 runs kernels slowly on the CPU)"
        case "cuda":
            if find_spec("triton") is None:
                return "the kernels beside its own are Triton's, which is not installed"
            if not torch.cuda.is_available():
                return "there is no GPU"
            if not on_hopper():
                return "its kernels are for Hopper, the GPU is another"
            if find_nvcc() is None:
                return "its kernels have to be compiled and there is no nvcc on the PATH"
    return None
