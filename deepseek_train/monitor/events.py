"""``events.jsonl``: what happened to a run besides its steps, one JSON object a line. It is only ever added to: a run
that is rolled back loses the steps it takes again, never the reason.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class Event:
    step: int
    what: str  # "skipped", "rolled back", "stopped", "other data", ...
    why: str
    window: tuple[int, int] | None = (
        None  # the sequences it concerns: the first, and the first one behind them
    )


def record_event(folder: Path, event: Event) -> None:
    """Adds a line with the time (UTC) to the run folder's events; by one rank alone."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(event)}
    with (folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_events(folder: Path) -> list[Event]:
    """All of them, the oldest first; none where nothing happened."""
    path = folder / EVENTS_FILE
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        window = record["window"]
        found.append(Event(record["step"], record["what"], record["why"], tuple(window) if window else None))
    return found
