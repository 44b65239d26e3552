"""How a fault of a schedule is shown: the rank's row with an arrow under the fault."""

from collections.abc import Sequence

_SHOWN = 6  # words shown on either side of a fault


class ScheduleError(ValueError):
    """A schedule that cannot run. The message shows the rank's row with an arrow under the fault."""


def fault(name: str, rank: int, row: Sequence[object], index: int, problem: str) -> ScheduleError:
    """The error for ``problem`` at word ``index`` of ``row``, what rank ``rank`` of schedule ``name`` does; an index
    behind the last word says that something is missing there.
    """
    first, end = max(0, index - _SHOWN), index + _SHOWN + 1
    label = f"rank {rank}: " + ("... " if first else "")
    before, shown = ([str(word) for word in part] for part in (row[first:index], row[index:end]))
    line = label + " ".join(before + shown) + (" ..." if end < len(row) else "")
    arrow = " " * len(label + "".join(word + " " for word in before)) + "^"
    return ScheduleError(f"{name}, rank {rank}, step {index}: {problem}\n{line}\n{arrow}")
