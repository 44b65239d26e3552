"""What the average of the weights and the comparison of replicas add to a training step, on CPU ranks of this machine.

One job takes its steps in turns, two plain ones, two with the average, so whatever else the machine does hits them
alike. The average's thread needs a core that the ranks leave free: one rank shows what it costs
where there is one, two ranks on two cores what it costs where there is none.

    python -m benchmarks.ema --rounds 12
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from deepseek_train.config.schema import RunConfig
from deepseek_train.data.prepare import prepare
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.optim.ema import Ema
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.train.build import build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.replicas import check_replicas
from deepseek_train.train.state import Progress
from deepseek_train.train.step import train_step
from tests.dist.composed import compose_config
from tests.harness import run_ranks

RESULTS = Path(__file__).parent / "results"
PATIENCE = 900  # seconds
LAYOUTS = {
    1: ["parallel=single", "schedule=1f1b"],
    2: ["parallel.pp=2", "parallel.dp=1", "parallel.ep=1"],
}


@dataclass(frozen=True)
class Result:
    """Of rank 0; medians over rounds."""

    ranks: int
    averaged_megabytes: float  # of averages on this rank
    plain_ms: float  # a step
    averaged_ms: float  # a step with the average
    plain_cpu_ms: float  # CPU time of the process over the same: what remains meaningful on a shared machine
    averaged_cpu_ms: float
    copy_ms: float  # of it, until ``update`` returns: what is never hidden
    move_ms: float  # the thread's arithmetic alone, while nothing else runs
    check_ms: float  # one comparison of all replicas (0: there are none)
    rounds: int


def race(rank: int, world_size: int, config: RunConfig, rounds: int) -> Result:
    job = build(
        config,
        resolve_layout(config, world_size),
        Place(rank, world_size, rank, world_size, torch.device("cpu")),
    )
    ema, plain = job.ema, replace(job, ema=None)
    assert isinstance(ema, Ema)
    progress = Progress()
    times: dict[str, list[float]] = {
        name: [] for name in ("plain", "averaged", "plain_cpu", "averaged_cpu", "copy", "move", "check")
    }
    for number in range(rounds + 1):
        for name, one in (("plain", plain), ("averaged", job)):
            progress, _ = train_step(one, progress, traced=False)
            # The second of two: it is the one behind which the first one's average moves.
            cpu = time.process_time()
            progress, metrics = train_step(one, progress, traced=False)
            times[name].append(metrics.step_seconds)
            ema.wait()
            times[f"{name}_cpu"].append(time.process_time() - cpu)
        started = time.perf_counter()
        ema.update(10**6)
        copied = time.perf_counter()
        ema.wait()
        times["copy"].append(copied - started)
        times["move"].append(time.perf_counter() - copied)
        times["check"].append(check_replicas(job, number) if world_size > 1 else 0.0)
    ms = {name: 1e3 * statistics.median(found[1:]) for name, found in times.items()}
    return Result(
        ranks=world_size,
        averaged_megabytes=sum(average.tensor.nbytes for average in ema.averages()) / 1e6,
        plain_ms=ms["plain"],
        averaged_ms=ms["averaged"],
        plain_cpu_ms=ms["plain_cpu"],
        averaged_cpu_ms=ms["averaged_cpu"],
        copy_ms=ms["copy"],
        move_ms=ms["move"],
        check_ms=ms["check"],
        rounds=rounds,
    )


def configuration(ranks: int, folder: Path) -> RunConfig:
    """``experiment=tiny`` over a little of its text."""
    overrides = [
        *LAYOUTS[ranks],
        f"data.path={folder / 'tokens'}",
        f"run_dir={folder / 'run'}",
        "data.max_megabytes=1",
        "cluster.device=cpu",
        "train.check_replicas_every=0",
    ]
    config = compose_config(overrides)
    prepare(config.data, config.model.vocab_size)
    return config


def table(results: list[Result]) -> str:
    lines = [
        "| ranks | averages of a rank, MB | step, ms | with the average, ms | CPU, ms | with the average, ms "
        "| copy, ms | arithmetic, ms | both, of a step | comparison of replicas, ms | of a step, at every 100th |",
        "| ---: " * 11 + "|",
    ]
    for r in results:
        both = (r.copy_ms + r.move_ms) / r.plain_ms
        check = f"{r.check_ms:.1f} | {r.check_ms / (100 * r.plain_ms):.3%}" if r.ranks > 1 else "- | -"
        lines.append(
            f"| {r.ranks} | {r.averaged_megabytes:.1f} | {r.plain_ms:.0f} | {r.averaged_ms:.0f} "
            f"| {r.plain_cpu_ms:.0f} | {r.averaged_cpu_ms:.0f} | {r.copy_ms:.1f} | {r.move_ms:.1f} | {both:.2%} "
            f"| {check} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for ema.json and ema.md")
    args = parser.parse_args()
    facts = machine_facts()
    about = {
        "cpu": f"{facts.cpu}, {facts.cores} cores",
        "load": f"{os.getloadavg()[0]:.1f} before the run",  # of others, whom the turns share the machine with
        "torch": torch.__version__,
        "revision": facts.git_revision or "unknown",
        "rounds": str(args.rounds),
    }
    results = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            config = configuration(ranks, Path(folder))
            results.append(run_ranks(race, ranks, config, args.rounds, timeout=PATIENCE)[0])
    args.output.mkdir(parents=True, exist_ok=True)
    found = {**about, "results": [asdict(result) for result in results]}
    (args.output / "ema.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = "\n".join(f"- {key}: {value}" for key, value in about.items())
    (args.output / "ema.md").write_text(
        "# The average of the weights, and the comparison of replicas\n\n`experiment=tiny` in FP32, made by "
        "`python -m benchmarks.ema`. Medians of interleaved rounds. On a machine that others use, steps differ by more "
        "than an average takes; what it takes by itself, its copy and its arithmetic, stands beside them.\n\n"
        f"{lines}\n\n{table(results)}\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
