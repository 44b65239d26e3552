"""What was measured as rows, as JSON and as Markdown."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.bubble.race import Case, Measured

CONTESTANTS = ("ours", "torch", "deepspeed")
_BUBBLES = """# Bubbles on four ranks, measured

Made by `python -m benchmarks.pipeline_bubble`: 4 gloo ranks on one machine, real graphs whose F, I and W sleep equally
long. Bubble = 1 - slept / time from the barrier to the last rank: of the least disturbed step (median). Ideal: the same
schedule simulated without latency, where a full backward or a pair hands over what it made when all of it is done, as
torch does. Ours sends input gradients before weight gradients are computed; "early" is the ideal of that.

Chunks are equally long everywhere: each micro-batch is one chunk on each rank, two in interleaved_1f1b, interleaved_zb,
zb_v and dualpipe_v; of dualpipe's two stages a rank runs each micro-batch through one. DeepSpeed's engine keeps W in B.
""".splitlines()
_OVERHEAD = """
# What an action costs

The same with nothing to sleep (`--overhead`): microseconds per action (F, B, I, W) of a step, by the clock and in CPU
time of a rank's main thread, medians. The clock includes waiting for a core: the ranks have fewer than they are.
""".splitlines()


@dataclass(frozen=True)
class BubbleRow:
    """One case at one chunk time: bubbles are idle shares of all ranks' time."""

    chunk_ms: float  # each of F, I, W
    microbatches: int
    schedule: str
    who: str
    chunks: int  # a rank's
    ideal: float  # simulated, no latency
    ideal_early: float  # the same, with input gradients sent before weight gradients are done
    least: float  # of the least disturbed step
    median: float
    excess: float  # least - ideal
    bubbles: tuple[float, ...]  # every round


@dataclass(frozen=True)
class OverheadRow:
    """One case with nothing to do: medians over the rounds."""

    microbatches: int
    schedule: str
    who: str
    actions: int  # a rank's: F, B, I, W
    wall_us: float  # of a step / actions; four ranks share the machine's cores
    cpu_us: float  # of a rank's main thread / actions


@dataclass(frozen=True)
class Section:
    """One kind of measurement with the machine and revision it is from."""

    where: dict[str, str]
    bubble: tuple[BubbleRow, ...] = ()
    overhead: tuple[OverheadRow, ...] = ()


def bubble_row(measured: Measured, chunk_ms: float, microbatches: int) -> BubbleRow:
    assert measured.ideal is not None
    assert measured.ideal_early is not None
    bubbles, case = measured.bubbles(), measured.case
    least, median = min(bubbles), statistics.median(bubbles)
    return BubbleRow(
        chunk_ms=chunk_ms,
        microbatches=microbatches,
        schedule=case.schedule,
        who=case.who,
        chunks=measured.chunks,
        ideal=measured.ideal,
        ideal_early=measured.ideal_early,
        least=least,
        median=median,
        excess=least - measured.ideal,
        bubbles=tuple(bubbles),
    )


def overhead_row(measured: Measured, microbatches: int) -> OverheadRow:
    per_action = 1e6 / measured.actions
    return OverheadRow(
        microbatches=microbatches,
        schedule=measured.case.schedule,
        who=measured.case.who,
        actions=measured.actions,
        wall_us=per_action * statistics.median(measured.spans),
        cpu_us=per_action * statistics.median(measured.cpu),
    )


def save(path: Path, bubble: Section, overhead: Section) -> None:
    """JSON; ``load`` gives the same back."""
    path.write_text(json.dumps({"bubble": asdict(bubble), "overhead": asdict(overhead)}, indent=1) + "\n")


def load(path: Path) -> tuple[Section, Section]:
    """Bubble and overhead; empty ones where there is no such file."""
    if not path.exists():
        return Section({}), Section({})
    found = json.loads(path.read_text())
    bubble = tuple(
        BubbleRow(**{**row, "bubbles": tuple(row["bubbles"])}) for row in found["bubble"]["bubble"]
    )
    overhead = tuple(OverheadRow(**row) for row in found["overhead"]["overhead"])
    return Section(found["bubble"]["where"], bubble=bubble), Section(
        found["overhead"]["where"], overhead=overhead
    )


def markdown(bubble: Section, overhead: Section) -> str:
    return "\n".join(
        [
            *_BUBBLES,
            *_where(bubble),
            "",
            *bubble_table(bubble.bubble),
            *_OVERHEAD,
            *_where(overhead),
            "",
            *overhead_table(overhead.overhead),
            "",
        ]
    )


def bubble_table(rows: Iterable[BubbleRow]) -> list[str]:
    lines = [
        "| ms | m | schedule | ideal | early | ours | torch | DeepSpeed | excess: ours | torch | DeepSpeed |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[float, int, str], dict[str, BubbleRow]] = {}
    for row in rows:
        groups.setdefault((row.chunk_ms, row.microbatches, row.schedule), {})[row.who] = row
    for (chunk_ms, microbatches, schedule), by_who in groups.items():
        found = [by_who.get(who) for who in CONTESTANTS]
        one = next(iter(by_who.values()))
        cells = [f"{chunk_ms:g}", str(microbatches), schedule, f"{one.ideal:.3f}", f"{one.ideal_early:.3f}"]
        cells += [f"{row.least:.3f} ({row.median:.3f})" if row else "" for row in found]
        cells += [f"{row.excess:+.3f}" if row else "" for row in found]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def overhead_table(rows: Iterable[OverheadRow]) -> list[str]:
    lines = ["| m | schedule | who | actions | us | CPU us |", "| ---: | --- | --- | ---: | ---: | ---: |"]
    for r in rows:
        lines.append(
            f"| {r.microbatches} | {r.schedule} | {r.who} | {r.actions} | {r.wall_us:.0f} | {r.cpu_us:.0f} |"
        )
    return lines


def not_reached(rows: Iterable[BubbleRow]) -> list[str]:
    """Where dualpipe is more than 0.010 above its ideal at 60 ms or more, or ours not closer to its ideal than
    torch's."""
    found, by_case = [], {(r.chunk_ms, r.microbatches, Case(r.who, r.schedule)): r for r in rows}
    for (chunk_ms, microbatches, case), row in by_case.items():
        if case.who != "ours":
            continue
        at = f"{row.schedule}, m={microbatches}, {chunk_ms:g} ms: excess {row.excess:+.4f}"
        if row.schedule == "dualpipe" and chunk_ms >= 60 and row.excess > 0.010:
            found.append(f"{at} is above +0.010")
        rival = by_case.get((chunk_ms, microbatches, Case("torch", row.schedule)))
        if rival is not None and row.excess >= rival.excess:
            found.append(f"{at} is not below torch's {rival.excess:+.4f}")
    return found


def _where(section: Section) -> list[str]:
    return [f"- {key}: {value}" for key, value in section.where.items()]
