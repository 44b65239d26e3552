"""What the faults of a soak have cost, and the page that says so."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deepseek_train.monitor.jsonl import read_history
from deepseek_train.monitor.machine import machine_facts
from tests.faults.soak_plan import KINDS, Fault


@dataclass(frozen=True)
class Life:
    """A run from its first start to its end. Moments: seconds, monotonic."""

    folder: Path
    ended: float
    starts: list[float]  # of the command
    restarts: int  # by the launcher
    taken: list[tuple[int, float]]  # every step done, as often as it was done, and when it was
    marks: dict[int, float]  # fault -> when it struck
    lines: list[tuple[float, str]]  # what was said


@dataclass(frozen=True)
class Cost:
    """Of one fault. Seconds from the moment it struck."""

    kind: str
    word: str
    detect: float | None  # until somebody says so; None where nobody is left who could
    recover: float  # until a step has been done again
    new_command: bool  # by a new start of the command, else the launcher started the ranks again
    lost_steps: int  # done before and to be done again


@dataclass(frozen=True)
class Soak:
    ranks: int
    steps: int
    commands: int
    restarts: int
    unplanned: int  # times that ranks started again without a fault of ours
    wall_seconds: float
    clean_wall_seconds: float
    useful_seconds: float  # in steps that count, once each
    goodput: float  # useful / wall
    clean_goodput: float
    costs: list[Cost]


def measured(clean: Life, soaked: Life, faults: Sequence[Fault], ranks: int, steps: int) -> Soak:
    useful, clean_useful = (_step_seconds(life.folder) for life in (soaked, clean))
    wall, clean_wall = (life.ended - life.starts[0] for life in (soaked, clean))
    return Soak(
        ranks=ranks,
        steps=steps,
        commands=len(soaked.starts),
        restarts=soaked.restarts,
        unplanned=len(soaked.starts) + soaked.restarts - 1 - len(faults),
        wall_seconds=wall,
        clean_wall_seconds=clean_wall,
        useful_seconds=useful,
        goodput=useful / wall,
        clean_goodput=clean_useful / clean_wall,
        costs=[_cost(soaked, fault, soaked.marks[number]) for number, fault in enumerate(faults)],
    )


def _step_seconds(folder: Path) -> float:
    return sum(step.step_seconds for step in read_history(folder / "metrics.jsonl").steps)


def _cost(life: Life, fault: Fault, struck: float) -> Cost:
    """Ranks may do another step after the fault, which is no recovery: that begins where steps are done again, or,
    after a stop that was asked for, where the ranks are back."""
    back = next(when for when, text in life.lines if when > struck and text.startswith("resumed from"))
    before = max((step for step, when in life.taken if when < back), default=0)
    after, recovered = next((step, when) for step, when in life.taken if when > back)
    told = [when for when, text in life.lines if when > struck and re.search(fault.kind.sign, text)]
    return Cost(
        kind=fault.kind.name,
        word=fault.word(),
        detect=told[0] - struck if fault.kind.sign else None,
        recover=recovered - struck,
        new_command=any(struck < start < recovered for start in life.starts),
        lost_steps=before - after + 1,
    )


def write_report(folder: Path, soak: Soak, seed: int, loads: Sequence[float]) -> str:
    """Writes soak.json and soak.md; returns the latter."""
    facts = machine_facts()
    about = {
        "machine": f"{facts.cpu}, {facts.cores} cores; ranks on CPUs, gloo",
        "load": f"{loads[0]:.1f} before, {loads[-1]:.1f} behind, our ranks included; times are upper bounds",
        "torch": torch.__version__,
        "revision": facts.git_revision or "unknown",
        "seed": str(seed),
    }
    text = page(soak, about)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.json").write_text(json.dumps({**about, **asdict(soak)}, indent=2) + "\n")
    (folder / "soak.md").write_text(text)
    return text


def page(soak: Soak, about: dict[str, str]) -> str:
    lines = "\n".join(f"- {key}: {value}" for key, value in about.items())
    return (
        f"# Soak: {len(soak.costs)} faults in one run\n\n"
        f"A small model on {soak.ranks} ranks takes {soak.steps} steps, with a fault of random kind, rank, phase and "
        f"step every {soak.steps / max(1, len(soak.costs)):.0f} steps and a checkpoint every 3. Made by `python -m "
        f"tests.faults.soak`. **All tensors of its last checkpoint, and loss, gradient norm and expert loads of every "
        f"step, are bitwise those of the same run without faults.**\n\n{lines}\n\n"
        f"- started {soak.commands} times by the soak, {soak.restarts} times again by `cluster.max_restarts`; "
        f"{soak.unplanned} of these without a fault of ours\n"
        f"- goodput (seconds in steps that count / wall): {soak.goodput:.1%} of {soak.wall_seconds:.0f} s; without "
        f"faults {soak.clean_goodput:.1%} of {soak.clean_wall_seconds:.0f} s. Steps take "
        f"{1e3 * soak.useful_seconds / soak.steps:.0f} ms here and starts seconds, so a fault every few steps leaves "
        f"little: the costs of a fault below are what carries over\n\n"
        "Seconds from the moment the fault struck: to the first line that tells of it, to the first step done again "
        "(starting the processes and loading included). Lost: steps that had to be done again. Median / worst. A stop "
        "that was asked for counts as told once it is saved; damage, once a start has found it. Hangs are told after "
        "`hang_seconds=4`, or within 14 s where others may take long (saving, a first step).\n\n"
        f"{table(soak.costs)}\n"
    )


def table(costs: Sequence[Cost]) -> str:
    rows = [
        "| fault | times | detected, s | recovered by the launcher, s | by a new command, s | lost, steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in (*(kind.name for kind in KINDS), "all"):
        found = [cost for cost in costs if name in (cost.kind, "all")]
        if found:
            cells = (
                _both([cost.detect for cost in found if cost.detect is not None], 1),
                _both([cost.recover for cost in found if not cost.new_command], 1),
                _both([cost.recover for cost in found if cost.new_command], 1),
                _both([cost.lost_steps for cost in found], 0),
            )
            rows.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _both(values: Sequence[float], digits: int) -> str:
    """Median / worst."""
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f}" if values else "-"
