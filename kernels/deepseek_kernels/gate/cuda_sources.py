"""The gate for CUDA sources: nvcc compiles them without a warning, and their kernels keep to their limits."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from deepseek_kernels.cuda_library import OPTIONS, SOURCES
from deepseek_kernels.gate.case import Limits
from deepseek_kernels.machine import find_nvcc

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# By source: limits of each of its kernels. Registers are those at launch; the multiplying warps take 232 (setmaxnreg).
LIMITS = {
    "block_scaled_gemm": Limits(
        168,
        needs={
            "QGMMA.64x128x32": 36,
            "QGMMA.64x192x32": 8,
            "UTMALDG.2D.MULTICAST": 4,
            "USETMAXREG": 8,
            "UTMASTG.2D": 3,
            "UBLKRED": 1,
        },
    ),
    "quantise_tiles": Limits(128, needs={"LDGSTS.E.BYPASS.128": 14, "STG.E.128": 28, "LDS.128": 28}),
    "pack_e5m6": Limits(64, needs={"LDG.E.128": 8, "STG.E.128": 1}),
}


@dataclass(frozen=True)
class Compiled:
    registers: int  # of the kernel with most
    complaints: list[str]  # what compiler and limits say; empty: good
    counts: dict[str, int]  # of the required instructions, in the whole library


def compile_source(source: str) -> Compiled:
    """Compiles ``csrc/{source}.cu`` into a temporary folder."""
    limits, nvcc = LIMITS[source], find_nvcc()
    if nvcc is None:
        return Compiled(
            0, ["there is no nvcc on the PATH: apt-get install nvidia-cuda-toolkit, or CUDA's own"], {}
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "library.so"
        command = [
            nvcc,
            *OPTIONS,
            "-Xptxas",
            "-v",
            "-Werror",
            "all-warnings",
            "-o",
            target,
            SOURCES / f"{source}.cu",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        if done.returncode:
            return Compiled(0, [f"nvcc: {said.strip()}"], {})
        code = subprocess.run(
            [_TOOLS / "cuobjdump", "-sass", target], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said))
    counts = {need: len(re.findall(rf"\s{re.escape(need)}\b", code)) for need in limits.needs}
    complaints = re.findall(r"\(C\d+\)[^\n]*", said)  # "instructions are serialized" and its like
    if registers > limits.registers:
        complaints.append(f"registers {registers} > {limits.registers}")
    if spilled:
        complaints.append(f"stack and spills {spilled} bytes > 0")
    complaints += [f"{n} {counts[n]} < {least}" for n, least in limits.needs.items() if counts[n] < least]
    return Compiled(registers, complaints, counts)
