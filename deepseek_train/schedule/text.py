"""Schedules as text: to read, to compare, to keep in a file, and back.

    dualpipe microbatches=8 stages=0/3,1/2,2/1,3/0
    rank 0: 0F0 0F1 0F2 3F4 3I4 3W4 3F5 0F3&3B5 ...
    rank 1: ...

``stages`` lists for each stage the ranks that run it, one for each direction. Steps are separated by blanks
or commas.
"""

import re

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule, Step

_HEADER = re.compile(r"(?P<name>\S+) microbatches=(?P<count>\d+) stages=(?P<stages>\d+(/\d+)*(,\d+(/\d+)*)*)")
_ROW = re.compile(r"rank (?P<rank>\d+):(?P<steps>.*)")
_ACTION = re.compile(r"(?P<stage>\d+)(?P<kind>[FBIW])(?P<microbatch>\d+)")


class ScheduleSyntaxError(ValueError):
    """A text that is no schedule: says where, what stands there, and what should."""


def to_text(schedule: Schedule) -> str:
    """Header line, then a line for each rank. ``from_text`` gives the same schedule back."""
    if not re.fullmatch(r"\S+", schedule.name):
        raise ValueError(f"a schedule's name is one word, got {schedule.name!r}: write it without blanks")
    placement = schedule.placement
    stages = ",".join("/".join(map(str, ranks)) for ranks in placement.ranks_SX)
    header = f"{schedule.name} microbatches={placement.num_microbatches} stages={stages}"
    rows = [" ".join([f"rank {rank}:", *map(str, steps)]) for rank, steps in enumerate(schedule.steps_R)]
    return "\n".join([header, *rows]) + "\n"


def from_text(text: str) -> Schedule:
    """The schedule ``text`` describes. Raises ``ScheduleSyntaxError``; whether it can run is for ``check`` to
    say.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    header = _HEADER.fullmatch(lines[0][1]) if lines else None
    if header is None:
        got = repr(lines[0][1]) if lines else "nothing"
        raise ScheduleSyntaxError(
            f"line 1: a header like '1f1b microbatches=4 stages=0,1' belongs here, got {got}"
        )
    rows = [(number, *_parse_row(number, line)) for number, line in lines[1:]]
    for expected, (number, rank, _) in enumerate(rows):
        if rank != expected:
            raise ScheduleSyntaxError(
                f"line {number}: rank {rank} where rank {expected} belongs: ranks in order"
            )
    ranks_SX = tuple(tuple(map(int, ranks.split("/"))) for ranks in header["stages"].split(","))
    if len({len(ranks) for ranks in ranks_SX}) > 1:
        raise ScheduleSyntaxError(
            f"line 1: every stage needs as many ranks as the others, got {header['stages']}"
        )
    placement = Placement(len(rows), int(header["count"]), ranks_SX)
    return Schedule(header["name"], placement, tuple(steps for _, _, steps in rows))


def _parse_row(number: int, line: str) -> tuple[int, tuple[Step, ...]]:
    row = _ROW.fullmatch(line)
    if row is None:
        raise ScheduleSyntaxError(f"line {number}: a row like 'rank 0: 0F0 0B0' belongs here, got {line!r}")
    return int(row["rank"]), tuple(_parse_step(number, word) for word in re.findall(r"[^\s,]+", row["steps"]))


def _parse_step(number: int, word: str) -> Step:
    match [_parse_action(number, half) for half in word.split("&")]:
        case [action]:
            return action
        case [forward, backward]:
            return Pair(forward, backward)
        case _:
            raise ScheduleSyntaxError(
                f"line {number}: {word!r} joins more than two actions: '0F2&1B5' is a pair"
            )


def _parse_action(number: int, word: str) -> Action:
    action = _ACTION.fullmatch(word)
    if action is None:
        raise ScheduleSyntaxError(
            f"line {number}: {word!r} is no action: write stage, one of F B I W, micro-batch, like '2F0'"
        )
    return Action(int(action["stage"]), Kind(action["kind"]), int(action["microbatch"]))
