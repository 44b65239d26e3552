"""What the console writes on: plain lines, or lines above a progress bar. A closed stdout is no error."""

import math
from typing import Protocol, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from deepseek_train.monitor.streams import SafeStream


class Display(Protocol):
    """Takes finished lines, and how far the run has come."""

    def line(self, text: str, style: str = "") -> None:
        """Writes one line; ``style`` is rich's ("bold red") and only seen on a terminal."""

    def progress(self, tokens: int, beside: str) -> None:
        """Moves the bar, if there is one, to ``tokens``, with ``beside`` next to it."""

    def close(self) -> None: ...


def open_display(stream: TextIO, total_tokens: int, progress_bar: bool) -> Display:
    """A bar if wanted and ``stream`` is a terminal, else plain lines."""
    safe = cast(TextIO, SafeStream(stream))
    return BarDisplay(safe, total_tokens) if progress_bar and stream.isatty() else PlainDisplay(safe)


class PlainDisplay:
    """Lines only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def line(self, text: str, style: str = "") -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def progress(self, tokens: int, beside: str) -> None:
        pass

    def close(self) -> None:
        self._stream.flush()


class BarDisplay:
    """A bar at the bottom of the terminal; lines, and whatever else is printed, scroll above it."""

    def __init__(self, stream: TextIO, total_tokens: int) -> None:
        self._console = Console(file=stream, highlight=False)
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=total_tokens)
        self._bar.start()

    def line(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)

    def progress(self, tokens: int, beside: str) -> None:
        self._bar.update(self._task, completed=tokens, description=beside)

    def close(self) -> None:
        self._bar.stop()


class Pace:
    """Time left, from a moving average of the seconds that a token takes."""

    def __init__(self, total_tokens: int) -> None:
        self._total = total_tokens
        self._seconds_per_token = math.nan
        self._updates = 0

    def update(self, tokens: int, tokens_per_second: float) -> float:
        """Seconds until ``total_tokens`` when ``tokens`` are consumed; NaN while unknown."""
        if tokens_per_second > 0:
            self._updates += 1
            now = 1.0 / tokens_per_second
            weight = max(0.05, 1.0 / self._updates)  # a plain mean at first
            last = now if self._updates == 1 else self._seconds_per_token
            self._seconds_per_token = last + weight * (now - last)
        return max(0, self._total - tokens) * self._seconds_per_token
