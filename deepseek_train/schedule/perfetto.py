"""A timeline as a Chrome trace (JSON), which ui.perfetto.dev and chrome://tracing open: one process per rank, below
it the tracks ``chunks``, ``compute`` and ``communication``. Format: the "Trace Event Format" document of Chrome."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.rows import stack
from deepseek_train.schedule.timeline import PhaseSpan, Span, Timeline

# Chrome's reserved colour names nearest to those of the pictures; Perfetto picks its own by name
_COLOURS = {
    Kind.FORWARD: "thread_state_iowait",  # orange
    Kind.BACKWARD: "thread_state_running",  # green
    Kind.BACKWARD_INPUT: "cq_build_passed",  # light green
    Kind.BACKWARD_WEIGHT: "thread_state_runnable",  # blue
}
_TRACKS = {"chunks": 0, Lane.COMPUTE.value: 100, Lane.COMMUNICATION.value: 200}  # first thread number of each
_MICROSECONDS = 1e6

Event = dict[str, Any]


def to_trace(timeline: Timeline, name: str = "pipeline") -> dict[str, Any]:
    """The trace as a JSON-able object. Seconds become microseconds (of unitless times one unit is a second), the first
    start is 0. Slices of one track may not overlap, so what runs at once on a lane (the halves of a real pair, two
    messages under way) gets a second track, "communication 2". Every span and phase is one slice.
    """
    origin = min((s.start for s in (*timeline.spans, *timeline.phases)), default=0.0)
    events: list[Event] = []
    for rank in range(timeline.num_ranks):
        events += _label("process", rank, 0, f"rank {rank}", rank)
        chunks = [span for span in timeline.spans if span.rank == rank]
        events += _track("chunks", rank, chunks, origin)
        for lane in Lane:
            phases = [phase for phase in timeline.phases if phase.rank == rank and phase.lane is lane]
            events += _track(lane.value, rank, phases, origin)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"name": name}}


def write_trace(timeline: Timeline, path: Path, name: str = "pipeline") -> Path:
    """``to_trace`` as a file; a path that ends in ``.json`` opens everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_trace(timeline, name)), encoding="utf-8")
    return path


def _track(name: str, rank: int, items: Sequence[Span | PhaseSpan], origin: float) -> Iterator[Event]:
    for number, row in enumerate(stack(items)):
        thread = _TRACKS[name] + number
        yield from _label("thread", rank, thread, f"{name} {number + 1}" if number else name, thread)
        for item in row:
            yield _slice(item, rank, thread, name, origin)


def _slice(item: Span | PhaseSpan, rank: int, thread: int, category: str, origin: float) -> Event:
    what = f"{item.kind.value} m{item.microbatch} s{item.stage}"
    start, end = (round((time - origin) * _MICROSECONDS, 3) for time in (item.start, item.end))
    facts: dict[str, Any] = {"kind": item.kind.name, "stage": item.stage, "microbatch": item.microbatch}
    if isinstance(item, Span):
        facts["paired"] = item.paired
    return {
        "name": what if isinstance(item, Span) else f"{item.name} {what}",
        "cat": category,
        "ph": "X",
        "pid": rank,
        "tid": thread,
        "ts": start,
        "dur": round(end - start, 3),
        "cname": _COLOURS[item.kind],
        "args": facts,
    }


def _label(of: str, rank: int, thread: int, name: str, place: int) -> list[Event]:
    """Names a process or a thread, and says where it stands among the others."""
    common = {"ph": "M", "pid": rank, "tid": thread}
    return [
        {"name": f"{of}_name", "args": {"name": name}, **common},
        {"name": f"{of}_sort_index", "args": {"sort_index": place}, **common},
    ]
