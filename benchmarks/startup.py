"""From the start of ``deepseek-train experiment=tiny`` (4 ranks of this machine) to the end of its first step.

python -m benchmarks.startup --rounds 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.starting.note import VARIABLE
from deepseek_train.data.prepare import prepare
from deepseek_train.monitor import markdown
from deepseek_train.monitor.machine import machine_facts
from tests.dist.composed import compose_config

RESULTS = Path(__file__).parent / "results"
PATIENCE = 300  # seconds
OVERRIDES = [
    "experiment=tiny",
    "resume=never",
    "train.eval_microbatches=2",
    "data.max_megabytes=1",
    "cluster.device=cpu",
]
HEAD = ("phase", "median, s", "least, s", "CPU, s")


@dataclass(frozen=True)
class Phase:
    """Medians over the rounds. ``cpu``: of the process that the others wait for, in the ranks rank 0."""

    name: str
    seconds: float
    least: float
    cpu: float


def start(folder: Path, overrides: list[str]) -> list[tuple[str, float, float]]:
    """One start: each phase, its seconds, its seconds of CPU."""
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.starting", *overrides]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), VARIABLE: str(notes)}
    before = time.monotonic()
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=PATIENCE, capture_output=True)
    found = []
    for phase, at, cpu in map(json.loads, notes.read_text().splitlines()):
        found.append((phase, at - before, cpu))
        before = at
    return found


def phases(rounds: list[list[tuple[str, float, float]]]) -> list[Phase]:
    """By phase, and the sum of them."""
    found = []
    for same in zip(*rounds, strict=True):
        seconds = [one[1] for one in same]
        cpu = statistics.median(one[2] for one in same)
        found.append(Phase(same[0][0], statistics.median(seconds), min(seconds), cpu))
    whole = [sum(one[1] for one in round) for round in rounds]
    cpu = statistics.median(sum(one[2] for one in round) for round in rounds)
    return [*found, Phase("process start to first step", statistics.median(whole), min(whole), cpu)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for startup.json and startup.md")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*OVERRIDES, f"data.path={folder / 'tokens'}"]
        config = compose_config(overrides)
        prepare(config.data, config.model.vocab_size)
        start(folder, overrides)  # files come from the page cache from now on
        found = phases([start(folder, overrides) for _ in range(args.rounds)])
    facts = machine_facts()
    about = {
        "cpu": f"{facts.cpu}, {facts.cores} cores",
        "load": f"{load:.1f} before the run",  # of others, who take their share of the cores
        "torch": dict(facts.versions)["torch"],
        "revision": facts.git_revision or "unknown",
        "rounds": str(args.rounds),
    }
    rows = [(p.name, f"{p.seconds:.2f}", f"{p.least:.2f}", f"{p.cpu:.2f}") for p in found]
    table = markdown.table(HEAD, rows)
    args.output.mkdir(parents=True, exist_ok=True)
    whole = {**about, "phases": [asdict(phase) for phase in found]}
    (args.output / "startup.json").write_text(json.dumps(whole, indent=2) + "\n")
    (args.output / "startup.md").write_text(
        "# From the start of the process to the end of the first step\n\n`experiment=tiny`, 4 ranks, made by "
        "`python -m benchmarks.startup`. Files lie in the page cache. CPU: of the one process that the others wait for "
        "(the command, the server that ranks are forked from, rank 0).\n\n"
        + "\n".join(f"- {key}: {value}" for key, value in about.items())
        + f"\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
