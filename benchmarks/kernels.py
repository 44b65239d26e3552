"""Every kernel at DeepSeek-V3's shapes beside its floor and beside what users have today, on one Hopper GPU.

    PYTHONPATH=kernels:. python3 -m benchmarks.kernels          # needs torch, triton and this repository, nothing else

Writes benchmarks/results/kernels.{json,md} (``--out``: another folder). Correctness is ``pytest tests/gpu``, first.
Without a GPU the same script rehearses, interpreted and small, and writes nothing unless ``--out`` is given: its
times mean nothing.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from benchmarks.kernel import attention_bound, memory_bound, products
from benchmarks.kernel.contest import Contest
from benchmarks.kernel.measure import ceilings, race
from benchmarks.kernel.report import facts, table, write
from deepseek_kernels.machine import interpreting

RESULTS = Path(__file__).parent / "results"
REHEARSAL_SHRINK = 64


def contests(device: torch.device, shrink: int) -> Iterator[Contest]:
    yield from products.contests(device, shrink)
    yield from attention_bound.contests(device, shrink)
    yield from memory_bound.contests(device, shrink)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", default="", help="contests whose name contains this")
    parser.add_argument("--revision", help="of the sources, where there is no git to ask")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not interpreting()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(time.time_ns())
    limits, results = ceilings(device), []
    for contest in contests(device, 1 if on_gpu else REHEARSAL_SHRINK):
        if given.only in contest.op:
            results += race(contest, limits, device)
            for one in results[-len(contest.entries) :]:
                took = one.note if one.ms is None else f"{one.ms:.4f} ms"
                print(f"{one.op} {one.shape} {one.entry}: {took}", flush=True)
    about = facts(device, given.revision)
    if given.out or on_gpu:
        print(write(given.out or RESULTS, "kernels", about, limits, results))
    else:
        print(table(about, limits, results))


if __name__ == "__main__":
    main()
