"""A timeline as text, for the terminal: one row per rank, time to the right.

    time   0       4       8
    rank 0 F0  F1  f4  [F2&b4----]..B0----- I1  W1

A letter per kind (F B I W) and the micro-batch; lower case is the second tone of ``rows.Tones``: from the last rank to
the first, or a later stage of the rank. ``[F2&b4]`` is an overlapped pair, ``-`` goes on with
what stands left of it, ``.`` is idle.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.rows import Tones, pairs, tones
from deepseek_train.schedule.timeline import Span, Timeline

_IDLE = "."
_STRETCH = 8.0  # widest drawing, over that in which only the longest chunks can be read
_MARGIN = 8
# of the 256 terminal colours, background and text: of both tones
_COLOURS = {
    Kind.FORWARD: ("48;5;223;38;5;16", "48;5;208;38;5;16"),
    Kind.BACKWARD: ("48;5;151;38;5;16", "48;5;71;38;5;16"),
    Kind.BACKWARD_INPUT: ("48;5;152;38;5;16", "48;5;37;38;5;16"),
    Kind.BACKWARD_WEIGHT: ("48;5;153;38;5;16", "48;5;68;38;5;16"),
}


@dataclass(frozen=True)
class _Cell:
    """What stands for a chunk or a pair: ``head`` is always there, ``tail`` fills up."""

    start: float
    end: float
    labels: tuple[str, ...]
    colours: tuple[str, ...]

    @property
    def shortest(self) -> int:
        """Columns it takes to be read."""
        return len("&".join(self.labels)) + len(self.labels)  # a blank behind, or two brackets

    def letters(self, width: int) -> list[tuple[str, str]]:
        """``width`` characters, each with its colour."""
        if len(self.labels) == 2:
            forward, backward = self.labels
            text = f"[{forward}&{backward}" if width >= self.shortest else "[&"
            text = text[: max(0, width - 1)].ljust(width - 1, "-") + "]" * (width > 0)
            first = text.find("&") + 1 if "&" in text else width
            return [(letter, self.colours[place >= first]) for place, letter in enumerate(text)]
        label = self.labels[0] if width >= len(self.labels[0]) else self.labels[0][:1]
        text = label[:width].ljust(width - 1, "-").ljust(width)
        return [(letter, self.colours[0]) for letter in text]


def render(timeline: Timeline, columns: int | None = None, colour: bool = False) -> str:
    """The drawing, lines joined by newlines, without one at the end. ``columns`` wide parts stand one below the other
    (None: one part, as wide as it gets). ``colour`` adds the terminal's codes. ``timeline`` needs one span.

    Columns stand for equal times, exactly where all times are multiples of a common one, rounded where they are not.
    """
    begin, makespan = min(span.start for span in timeline.spans), timeline.makespan()
    two = tones(timeline)
    cells_R = [
        [_cell(group, begin, two) for group in pairs([s for s in timeline.spans if s.rank == rank])]
        for rank in range(timeline.num_ranks)
    ]
    scale = _columns_per_second([cell for cells in cells_R for cell in cells])
    width = max(1, round(makespan * scale))
    axis = _axis(makespan, scale, width)
    rows_R = [_row(cells, scale, width) for cells in cells_R]
    part = width if columns is None else max(20, columns - _MARGIN)
    blocks = []
    for left in range(0, width, part):
        lines = [f"{'time':<{_MARGIN}}{axis[left : left + part]}".rstrip()]
        for rank, row in enumerate(rows_R):
            lines.append(f"{f'rank {rank}':<{_MARGIN}}{_paint(row[left : left + part], colour)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(group: tuple[Span, ...], begin: float, two: Tones) -> _Cell:
    labels, colours = [], []
    for span in group:
        second = two.is_second(span)
        letter = span.kind.value.lower() if second else span.kind.value
        labels.append(f"{letter}{span.microbatch}")
        colours.append(_COLOURS[span.kind][second])
    start, end = min(s.start for s in group) - begin, max(s.end for s in group) - begin
    return _Cell(start, end, tuple(labels), tuple(colours))


def _columns_per_second(cells: list[_Cell]) -> float:
    """Enough for every label to be read, and a whole number for the common step of all times if there is one."""
    timed = [cell for cell in cells if cell.end > cell.start]
    if not timed:
        return 1.0
    needs = [cell.shortest / (cell.end - cell.start) for cell in timed]
    enough = min(max(needs), _STRETCH * min(needs))
    unit = min(cell.end - cell.start for cell in timed)
    times = [Fraction(t / unit).limit_denominator(1000) for cell in timed for t in (cell.start, cell.end)]
    common = math.lcm(*(t.denominator for t in times))
    step = unit * math.gcd(*(int(t * common) for t in times)) / common
    on_grid = math.ceil(enough * step * (1 - 1e-9)) / step
    return on_grid if on_grid <= 2 * enough else enough


def _row(cells: list[_Cell], scale: float, width: int) -> list[tuple[str, str]]:
    row = [(_IDLE, "")] * width
    for cell in cells:
        left, right = round(cell.start * scale), round(cell.end * scale)
        row[left:right] = cell.letters(right - left)
    return row


def _axis(makespan: float, scale: float, width: int) -> str:
    power = 10.0 ** math.floor(math.log10(_MARGIN / scale))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor * scale >= _MARGIN)
    axis = [" "] * (width + _MARGIN)
    for tick in range(int(makespan / step) + 1):
        left, label = round(tick * step * scale), f"{tick * step:g}"
        axis[left : left + len(label)] = label
    return "".join(axis)[: width + _MARGIN]


def _paint(row: list[tuple[str, str]], colour: bool) -> str:
    if not colour:
        return "".join(letter for letter, _ in row)
    parts = []
    for code, run in groupby(row, key=lambda item: item[1]):
        text = "".join(letter for letter, _ in run)
        parts.append(f"\x1b[{code}m{text}\x1b[0m" if code else text)
    return "".join(parts)
