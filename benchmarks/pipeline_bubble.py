"""Bubbles of pipeline schedules, measured on 4 gloo ranks: our executor beside torch.distributed.pipelining's classes
and DeepSpeed's DualPipeV engine, in turns, on stages that sleep.

    python -m benchmarks.pipeline_bubble                   # some 25 minutes; leave the machine alone
    python -m benchmarks.pipeline_bubble --overhead        # microseconds an action costs, into the same files
    python -m benchmarks.pipeline_bubble --quick --output FOLDER
"""

import argparse
import itertools
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

from benchmarks.bubble import deepspeed_engine, picture, report, torch_classes
from benchmarks.bubble.race import Case, Measured, Plan, race
from benchmarks.bubble.work import ChunkTimes
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.schedule import catalog

RESULTS = Path(__file__).parent / "results"
RANKS = 4
# neighbours in a round are the same schedule
CASES = tuple(
    Case(who, schedule)
    for schedule in dict.fromkeys((*catalog.NAMES, *torch_classes.NAMES))
    for who, known in (
        ("ours", catalog.NAMES),
        ("torch", torch_classes.NAMES),
        ("deepspeed", deepspeed_engine.NAMES),
    )
    if schedule in known
)


def fork_ranks(plan: Plan) -> list[Measured]:
    """Runs ``plan`` on ranks of its own. Nothing may have computed with torch in this process."""
    with tempfile.TemporaryDirectory(prefix="bubble_") as folder:
        start_processes(_rank, (folder, plan), nprocs=RANKS, start_method="fork")
        measured: list[Measured] = pickle.loads((Path(folder) / "measured").read_bytes())
        return measured


def _rank(rank: int, folder: str, plan: Plan) -> None:
    store, patience = FileStore(f"{folder}/store", RANKS), timedelta(minutes=2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=patience)
    measured = race(rank, RANKS, plan)
    if rank == 0:
        (Path(folder) / "measured").write_bytes(pickle.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def bubbles(
    chunk_ms: list[float], microbatches: list[int], rounds: int
) -> Iterator[tuple[report.BubbleRow, ...]]:
    """The rows of one race after the other."""
    for ms, count in itertools.product(chunk_ms, microbatches):
        times = ChunkTimes(*[ms / 1000] * 3)
        found = fork_ranks(Plan(CASES, count, times, rounds))
        yield tuple(report.bubble_row(one, ms, count) for one in found)


def machine() -> dict[str, str]:
    facts = machine_facts()
    versions = dict(facts.versions)
    return {
        "machine": f"{facts.cpu}, {facts.cores} cores",
        **{name: versions[name] for name in ("python", "torch", "deepspeed")},
        "revision": facts.git_revision or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunk-ms", nargs="+", type=float, default=[60.0, 20.0], help="of each F, I and W")
    parser.add_argument("--microbatches", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, help="steps of each contestant (5; 30 with --overhead)")
    parser.add_argument("--overhead", action="store_true", help="measure what an action costs, not bubbles")
    parser.add_argument("--quick", action="store_true", help="does it run? 8 micro-batches, 10 ms, one round")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for pipeline_bubble.{json,md,png}"
    )
    args = parser.parse_args()
    if args.quick:
        args.chunk_ms, args.microbatches, args.rounds = [10.0], [8], 1
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "pipeline_bubble.json"
    bubble, overhead = report.load(path)
    if args.overhead:
        overhead = report.Section(machine())
        for count in args.microbatches:
            found = fork_ranks(Plan(CASES, count, None, args.rounds or 30))
            new = (report.overhead_row(one, count) for one in found)
            overhead = replace(overhead, overhead=(*overhead.overhead, *new))
            write(path, bubble, overhead)
        print("\n".join(report.overhead_table(overhead.overhead)))
        return
    bubble = report.Section(machine())
    for rows in bubbles(args.chunk_ms, args.microbatches, args.rounds or 5):
        bubble = replace(bubble, bubble=(*bubble.bubble, *rows))
        write(path, bubble, overhead)
    print("\n".join(report.bubble_table(bubble.bubble)))
    print("\n".join(["", *(f"not reached: {what}" for what in report.not_reached(bubble.bubble))]))


def write(path: Path, bubble: report.Section, overhead: report.Section) -> None:
    """After every race: on a busy machine the later ones may be given up."""
    report.save(path, bubble, overhead)
    path.with_suffix(".md").write_text(report.markdown(bubble, overhead))
    if bubble.bubble:
        picture.draw(bubble.bubble, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
