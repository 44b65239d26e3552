"""What this machine can run. Torch is imported only where it is asked about GPUs: a command that is wrong says so at
once, without."""

import importlib
import os
import shutil
from functools import cache
from importlib.util import find_spec
from typing import Any


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here."""


def find_nvcc() -> str | None:
    """CUDA's compiler, on the PATH or where CUDA puts it."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def gpu_there() -> bool:
    """Whether torch can use a GPU."""
    found: bool = _cuda().is_available()
    return found


def on_hopper() -> bool:
    """Whether the GPU is an H100, H200 or H800."""
    found: bool = _cuda().get_device_capability() == (9, 0)
    return found


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
            if not interpreting() and not gpu_there():
                return "there is no GPU to compile for (TRITON_INTERPRET=1 runs kernels slowly on the CPU)"
        case "cuda":
            if find_spec("triton") is None:
                return "the kernels beside its own are Triton's, which is not installed"
            if not gpu_there():
                return "there is no GPU"
            if not on_hopper():
                return "its kernels are for Hopper, the GPU is another"
            if find_nvcc() is None:
                return "its kernels have to be compiled and there is no nvcc on the PATH"
    return None


def _cuda() -> Any:
    return importlib.import_module("torch.cuda")
