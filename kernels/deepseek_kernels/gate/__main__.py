"""The compiler gate: every Triton kernel, as it is launched, compiled for sm_90a and held to its limits. No GPU needed.

Prints kernel, figure and limit; exit code 1 where a limit is passed. Must run without TRITON_INTERPRET, in a process of
its own for each version of Triton.
"""

import argparse
import importlib
import sys

import triton

from deepseek_kernels.gate.case import Case
from deepseek_kernels.gate.cuda_sources import LIMITS, compile_source
from deepseek_kernels.gate.machine_code import compiled, faults
from deepseek_kernels.machine import interpreting

FAMILIES = ("attention", "gemm", "loss", "moe", "norm", "optim", "quant", "rope", "swiglu")
CUDA = "cuda"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deepseek_kernels.gate", description=__doc__)
    parser.add_argument(
        "families",
        nargs="*",
        metavar="FAMILY",
        help=f"of {' '.join((*FAMILIES, CUDA))}; all, if none is named",
    )
    families = parser.parse_args().families or [*FAMILIES, CUDA]
    if unknown := [f for f in families if f not in (*FAMILIES, CUDA)]:
        parser.error(
            f"there is no family {' or '.join(unknown)}: write {' '.join((*FAMILIES, CUDA))}, or none for all"
        )
    if interpreting():
        print("the gate compiles: run it without TRITON_INTERPRET", file=sys.stderr)
        return 2
    print(
        f"Triton {triton.__version__}, sm_90a: kernel, registers / limit, shared bytes / limit, required instructions"
    )
    failed = 0
    for family in [f for f in families if f != CUDA]:
        cases: tuple[Case, ...] = importlib.import_module(f"deepseek_kernels.{family}.gate_cases").CASES
        for case in cases:
            found = compiled(case)
            wrong = faults(case, found)
            failed += bool(wrong)
            needs = ", ".join(f"{n} {found.count(n)}/{least}" for n, least in case.limits.needs.items())
            limits = case.limits
            print(
                f"{'FAIL' if wrong else 'ok':4} {family}.{case.name:32} {found.registers:3} / {limits.registers:3} "
                f"{found.shared:6} / {limits.shared:6}  {needs}  {'; '.join(wrong)}",
                flush=True,
            )
    if CUDA in families:
        for source, limits in LIMITS.items():
            compiled_source = compile_source(source)
            failed += bool(compiled_source.complaints)
            counts = ", ".join(
                f"{n} {compiled_source.counts.get(n, 0)}/{least}" for n, least in limits.needs.items()
            )
            print(
                f"{'FAIL' if compiled_source.complaints else 'ok':4} csrc/{source}.cu by nvcc "
                f"{compiled_source.registers} / {limits.registers}  {counts}  {'; '.join(compiled_source.complaints)}",
                flush=True,
            )
    print(f"{failed} over their limits" if failed else "all within their limits")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
