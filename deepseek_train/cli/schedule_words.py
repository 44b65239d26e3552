"""What ``deepseek-schedule`` says around its drawings: facts in a line, and the table that compares schedules."""

from collections.abc import Sequence

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.facts import Facts
from deepseek_train.schedule.rows import tones
from deepseek_train.schedule.timeline import Timeline

Row = tuple[str, Facts | list[str]]  # the name, and what came of it: numbers, or why there are none

_KINDS = {
    Kind.FORWARD: "F forward",
    Kind.BACKWARD: "B backward",
    Kind.BACKWARD_INPUT: "I input gradients",
    Kind.BACKWARD_WEIGHT: "W weight gradients",
}
_HEAD = ("stages", "ranks", "makespan", "bubble %", "bubble", "formula", "activations", "weight queue")
_EQUAL_STAGES = (
    "At equal stages: where a rank holds 2 stages there are half as many ranks; ranks=4 instead of stages=8 compares "
    "at equal\nranks. dualpipe keeps every stage on two ranks: twice the weights of the others."
)
_EQUAL_RANKS = (
    "At equal ranks: the model is the same, so where a rank holds 2 stages each is half as big: half the time, and "
    '"9 x 1/2"\nactivations are 9 of half a size. '
    "dualpipe keeps every stage on two ranks: twice the weights of the others."
)


def facts_line(facts: Facts) -> str:
    """The schedule's sizes and what it costs."""
    formula = "" if facts.formula_bubble is None else f", formula {number(facts.formula_bubble)}"
    return (
        f"{facts.name}: {facts.stages} stages on {facts.ranks} ranks, {facts.microbatches} micro-batches: "
        f"makespan {number(facts.makespan)}, bubble {extent(facts.bubble)} "
        f"({100 * facts.bubble_fraction:.1f}%{formula}), at most {max(facts.peak_activations)} activations and "
        f"{max(facts.peak_weight_queue)} queued weight gradients on a rank"
    )


def legend(timeline: Timeline) -> str:
    """What the letters of the drawing mean that are in it."""
    words = [what for kind, what in _KINDS.items() if any(span.kind is kind for span in timeline.spans)]
    if (two := tones(timeline)).used:
        words.append(f"lower case: {two.names[1]}")
    if any(span.paired for span in timeline.spans):
        words.append("[F&B] overlapped pair")
    return ", ".join([*words, ". idle"])


def table(rows: Sequence[Row], equal_ranks: bool) -> str:
    """What is compared, a line for each schedule, and how to read them."""
    cells = [None if isinstance(found, list) else _cells(found, equal_ranks) for _, found in rows]
    widths = [max(map(len, column)) for column in zip(_HEAD, *filter(None, cells), strict=True)]
    margin = max(len(name) for name, _ in rows)
    texts = ["  ".join(map(str.rjust, ("".ljust(margin), *_HEAD), (margin, *widths)))]
    for (name, found), line in zip(rows, cells, strict=True):
        why = "; ".join(found) if isinstance(found, list) else ""
        texts.append(f"{name:<{margin}}  " + ("  ".join(map(str.rjust, line, widths)) if line else why))
    caption = _EQUAL_RANKS if equal_ranks else _EQUAL_STAGES
    how = "bubble, activations (live, in micro-batches of a stage) and weight queue: of the ranks the least - the most."
    return "\n".join([caption, "", *texts, "", how])


def _cells(facts: Facts, equal_ranks: bool) -> tuple[str, ...]:
    pieces = facts.stages // facts.ranks if equal_ranks else 1
    size = f" x 1/{pieces}" if pieces > 1 else ""
    return (
        str(facts.stages),
        str(facts.ranks),
        number(facts.makespan),
        f"{100 * facts.bubble_fraction:.1f}",
        extent(facts.bubble),
        "-" if facts.formula_bubble is None else number(facts.formula_bubble),
        extent(facts.peak_activations) + size,
        extent(facts.peak_weight_queue) + size,
    )


def extent(values: Sequence[float]) -> str:
    """The least and the most of them; one number where they are equal."""
    least, most = number(min(values)), number(max(values))
    return least if least == most else f"{least} - {most}"


def number(value: float) -> str:
    """Five digits."""
    return f"{round(value, 9):.5g}"
