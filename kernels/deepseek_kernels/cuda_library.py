"""Our CUDA sources as libraries: compiled by nvcc when first used, kept under the hash of what they were made of."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from deepseek_kernels.machine import BackendUnavailable, find_nvcc

SOURCES = Path(__file__).parent / "csrc"
OPTIONS = (
    *("-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"),
    *("--shared", "-Xcompiler", "-fPIC", "-cudart", "static"),
)
# Arguments of every entry point, by name.
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "deepseek_block_scaled_gemm": [*[_P] * 7, *[_I] * 7, _P],
    "deepseek_quantise_tiles": [*[_P] * 9, _L, *[_I] * 5, _P],
    "deepseek_pack_e5m6": [*[_P] * 3, _L, *[_I] * 2, _P],
}

_OF_FAMILY = {
    "gemm": ("block_scaled_gemm",),
    "grouped_gemm": ("block_scaled_gemm",),
    "quant": ("quantise_tiles", "pack_e5m6"),
    "swiglu": ("quantise_tiles",),
}


@cache
def cuda_function(source: str, name: str) -> Callable[..., int]:
    """The C function ``name`` of ``csrc/{source}.cu``; its tensors are addresses, its result is 0 or an error. Raises
    BackendUnavailable where it cannot be compiled."""
    function = getattr(ctypes.CDLL(str(library(source))), name)
    function.argtypes, function.restype = _SIGNATURES[name], ctypes.c_int
    return function


def compile_for(family: str) -> None:
    """All that this family of ops (``choice.FAMILIES``) will ask for, where it is not there yet."""
    for source in _OF_FAMILY[family]:
        library(source)


def library(source: str, folder: Path | None = None) -> Path:
    """The shared library of ``csrc/{source}.cu``, compiled if it is not there yet. ``folder``: where libraries are
    kept, by default the user's cache."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BackendUnavailable(f"{source}.cu has to be compiled and there is no nvcc on the PATH")
    inputs = [SOURCES / f"{source}.cu", *sorted(SOURCES.glob("*.cuh"))]
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in inputs) + " ".join(OPTIONS).encode())
    folder = folder or Path.home() / ".cache" / "deepseek_kernels"
    target = folder / f"{source}-{made_of.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=folder, prefix=source
        )  # nodes may share the folder, and process ids
        os.close(handle)
        draft = Path(name)
        done = subprocess.run(
            [nvcc, *OPTIONS, "-o", draft, inputs[0]], capture_output=True, text=True, check=False
        )
        if done.returncode:
            draft.unlink()
            raise BackendUnavailable(f"nvcc does not compile {source}.cu:\n{done.stdout}{done.stderr}")
        draft.replace(target)
    return target
