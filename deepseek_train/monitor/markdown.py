"""The pieces of Markdown that a report is made of."""

import re
from collections.abc import Iterable
from pathlib import Path


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Bars and line breaks inside a cell are kept from ending it."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [list(head), ["---"] * len(head), *escaped]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fence(text: str, language: str = "text") -> str:
    """A code block, its fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def picture(run_dir: Path, path: Path, alternative: str) -> str:
    """``path`` lies in ``run_dir``, where the report is."""
    return f"![{alternative}]({path.relative_to(run_dir).as_posix()})"
