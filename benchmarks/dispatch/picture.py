"""Each case's speed-up over flat dispatch beside what its bytes promise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from deepseek_train.monitor.pictures.style import INK, dress, new_figure, save


class Measured(Protocol):
    @property
    def case(self) -> str: ...
    @property
    def dispatcher(self) -> str: ...
    @property
    def wall_ms(self) -> float | None: ...
    @property
    def fewer_bytes_than_flat(self) -> float: ...


_COLOURS = {
    "flat": "#ea8a2c",
    "two_hop": "#23907f",
    "two_hop, two chunks": "#7fb8ad",
    "two_hop, FP8": "#444a8f",
}


def draw(results: Sequence[Measured], path: Path) -> Path:
    """Bars: wall time over flat's; ticks: cross-node bytes over flat's."""
    cases = list(dict.fromkeys(r.case for r in results))
    figure = new_figure(9.0, 4.4)
    axes = figure.add_subplot()
    dress(axes, "Dispatch and combine over slow links between nodes", "", "flat = 1")
    width = 0.8 / len(_COLOURS)
    for index, (name, colour) in enumerate(_COLOURS.items()):
        for place, case in enumerate(cases):
            mine = next((r for r in results if (r.case, r.dispatcher) == (case, name)), None)
            flat = next((r for r in results if (r.case, r.dispatcher) == (case, "flat")), None)
            if mine is None or flat is None or mine.wall_ms is None or flat.wall_ms is None:
                continue
            at = place + (index - (len(_COLOURS) - 1) / 2) * width
            axes.bar(at, mine.wall_ms / flat.wall_ms, width, color=colour, label=name if place == 0 else None)
            axes.plot(
                [at - width / 2, at + width / 2], [1 / mine.fewer_bytes_than_flat] * 2, color=INK, lw=1.5
            )
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
    axes.plot([], [], color=INK, lw=1.5, label="bytes between nodes")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    axes.set_ylim(0, 1.35)
    return save(figure, path)
