"""Which launch constants are fastest: ``python -m benchmarks.kernel.tune [--only NAME]`` on a GPU.

Each variant of a kernel has to give what its present constants give, and is timed; a kernel's fastest is printed last.
Before, processes beside each other compile all of them. With ``--shrink 64`` and TRITON_INTERPRET=1: a rehearsal.
"""

import argparse
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel.measure import median_ms
from benchmarks.kernel.trials import Trial, trials
from deepseek_kernels.machine import gpu_there, interpreting

CLOSE = 1e-5  # of sums in another order
COMPILERS = 8


def tensors(result: Any) -> list[Tensor]:
    """Those of a result, copied."""
    match result:
        case Tensor():
            return [result.clone()]
        case tuple():
            return [one for some in result for one in tensors(some)]
        case None | int():
            return []
    return tensors(tuple(vars(result).values()))


def compared(found: list[Tensor], expected: list[Tensor]) -> str:
    """To the bit; sums in FP32, whose order a variant may change, closely."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.element_size() == 1:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        if torch.equal(a, b):
            continue
        away = float((a.double() - b.double()).norm() / b.double().norm())
        if a.dtype is not torch.float32 or a.ndim > 1 or not away < CLOSE:
            return "WRONG"
        worst = max(worst, away)
    return f"close ({worst:.0e})" if worst else "equal"


def compile_all(trial: Trial) -> None:
    present = trial.present()
    for variant in {present, *trial.variants}:
        trial.choose(variant)
        trial.call()
    trial.choose(present)


def tune(trial: Trial, device: torch.device) -> None:
    present = trial.present()
    expected = tensors(trial.call())
    lines = []
    for variant in {present, *trial.variants}:
        trial.choose(variant)
        label = ", ".join(f"{name} {value}" for name, value in zip(trial.constants, variant, strict=True))
        try:
            said = compared(tensors(trial.call()), expected)
            ms = median_ms(trial.call, device, 20)
        except Exception as error:  # a variant that cannot run is a finding
            lines.append((torch.inf, f"{label}: {type(error).__name__}: {str(error)[:120]}"))
            continue
        finally:
            trial.choose(present)
        mark = ", present" if variant == present else ""
        lines.append((ms, f"{ms:.4f} ms, {trial.moved / ms / 1e6:5.0f} GB/s, {said}: {label}{mark}"))
    for _, line in sorted(lines, reverse=True):
        print(f"{trial.name}: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--shrink", type=int, default=1, help="divides the rows")
    parser.add_argument("--compile", type=int, default=None, help="compile every so many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    if not interpreting() and not gpu_there():
        parser.error("there is no GPU: to rehearse on a CPU, TRITON_INTERPRET=1 and --shrink 64")
    device = torch.device("cpu" if interpreting() else "cuda")
    if chosen.compile:
        for make in trials(device, 8)[chosen.first :: chosen.compile]:
            compile_all(make())
        return
    if not interpreting() and not chosen.only:
        command = [sys.executable, "-m", "benchmarks.kernel.tune", "--compile", str(COMPILERS), "--first"]
        compilers = [subprocess.Popen([*command, str(first)]) for first in range(COMPILERS)]
        for one in compilers:
            one.wait()
    for make in trials(device, chosen.shrink):
        trial = make()
        if chosen.only in trial.name:
            tune(trial, device)


if __name__ == "__main__":
    main()
