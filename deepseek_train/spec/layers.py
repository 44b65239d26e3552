"""How many transformer layers each stage holds, as text: ``3|4*14|2`` is 3, fourteen times 4, and 2."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from deepseek_train.config.parse import ConfigError, Problem

KEY = "parallel.layers"
_RUN = re.compile(r"\s*([0-9]{1,9})\s*(?:\*\s*([0-9]{1,9})\s*)?")


def layers_text(sizes: Sequence[int]) -> str:
    """``parse_layers`` gives ``sizes`` back."""
    runs = ((size, len(list(same))) for size, same in groupby(sizes))
    return "|".join(f"{size}*{count}" if count > 1 else str(size) for size, count in runs)


def parse_layers(text: str, num_layers: int, num_stages: int, example: str) -> tuple[int, ...]:
    """The sizes that ``text`` gives to ``num_stages`` stages. Raises ConfigError with all problems; ``example`` is a
    text that would do."""
    runs: list[tuple[int, int]] = []
    problems: list[Problem] = []
    for number, piece in enumerate(text.split("|"), start=1):
        run = _RUN.fullmatch(piece)
        if run is None:
            what = f"{piece.strip()!r} (piece {number} of {text!r}) is no number of layers"
            problems.append(
                Problem(KEY, what, "Write 4 for a stage of 4 layers, 4*14 for fourteen of them, 0 for none.")
            )
        elif run[2] is not None and int(run[2]) == 0:
            what = f"{piece.strip()!r} (piece {number} of {text!r}) repeats a stage 0 times"
            problems.append(Problem(KEY, what, "Leave it out, or repeat it once or more."))
        else:
            runs.append((int(run[1]), int(run[2] or 1)))
    problems = problems or list(_misfits(text, runs, num_layers, num_stages, example))
    if problems:
        raise ConfigError(problems)
    return tuple(size for size, count in runs for _ in range(count))


def _misfits(
    text: str, runs: list[tuple[int, int]], num_layers: int, num_stages: int, example: str
) -> Iterator[Problem]:
    """Looks at runs, not at stages: a run may claim billions of them."""
    mend = f"Write {example} or the like, or null for stages of even cost."
    stages, layers = sum(count for _, count in runs), sum(size * count for size, count in runs)
    if stages != num_stages:
        what = f"{text!r} describes {stages} stages, the pipeline has {num_stages}"
        yield Problem(KEY, what, mend)
    if layers != num_layers:
        what = (
            f"{text!r} places {layers} layers, the model has {num_layers}: {_difference(num_layers - layers)}"
        )
        yield Problem(KEY, what, mend)
    first = 0
    for size, count in runs:
        inner = range(max(1, first), min(first + count, stages - 1))
        if size == 0 and inner:
            what = f"{text!r} leaves stage {inner[0]} (counted from 0) without a layer"
            yield Problem(
                KEY, what, "Only the first stage, which embeds, and the last, with the head, may have 0."
            )
        first += count


def _difference(missing: int) -> str:
    return f"{missing} are missing" if missing > 0 else f"{-missing} too many"
