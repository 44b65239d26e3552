"""What is said when ranks fail: the first cause first, its followers folded, a hang with its stack."""

import re
import signal
from dataclasses import dataclass

LOG_LINES = 15  # of a rank's own output, shown beside its failure


@dataclass(frozen=True)
class Failure:
    """How one rank ended, where it did not end well."""

    rank: int
    headline: str  # "raised", "died of SIGABRT", "hung" ...
    detail: str  # traceback or stack, may be empty
    log: str  # what the rank printed
    when: float  # seconds on the system's monotonic clock, for the order of the report


class RanksFailed(AssertionError):
    """One or more ranks raised, died or hung; the message holds every rank's traceback or stack."""


def died(exit_code: int) -> str:
    """The words for a process that left no traceback."""
    if exit_code < 0:
        return f"died of {signal.Signals(-exit_code).name}"
    return f"left with exit code {exit_code}"


def failure_report(failures: list[Failure], world_size: int) -> str:
    """The whole message. Ranks that tell the same story (but for addresses and numbers) share one entry."""
    stories: dict[str, list[Failure]] = {}
    for failure in sorted(failures, key=lambda f: f.when):
        story = re.sub(r"0x[0-9a-f]+|\d+", "#", failure.headline + failure.detail)
        stories.setdefault(story, []).append(failure)
    parts = [f"{len(failures)} of {world_size} ranks failed, the first one first"]
    for same in stories.values():
        first = same[0]
        title = f"--- {_names(same)} {first.headline}"
        log = "\n".join(first.log.strip().splitlines()[-LOG_LINES:])
        parts += [title, first.detail.rstrip()] + ([f"  its output ended with:\n{log}"] if log else [])
    return "\n".join(part for part in parts if part)


def _names(same: list[Failure]) -> str:
    ranks = ", ".join(str(failure.rank) for failure in same)
    return f"rank {ranks}" if len(same) == 1 else f"ranks {ranks} (shown: {same[0].rank})"
