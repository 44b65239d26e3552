"""Runs as figures, as JSON and as Markdown. Shapes: S steps."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loss_gap.gradients import GradientError
from benchmarks.loss_gap.training import Curve
from deepseek_train.monitor import markdown, numbers

SHORT = "short, "
FP8, BF16 = "fp8", "bf16"
GOAL = 0.25  # %: the V3 report's bound (section 3.3)
_END = 0.1  # of a run, over which the training loss is averaged at its end

_HEAD = f"""# What FP8 training loses

Made by `python -m benchmarks.fp8_loss_gap`: one small DeepSeek-V3 (MLA, a dense layer, MoE layers with shared expert
and balance biases), trained on real text in one process a run. *fp8* is `precision=fp8`, V3's recipe, with products
added up as Hopper's tensor cores do it (`accumulate: hopper`: 32 products at a time into an accumulator of 13 fraction
bits, promoted to FP32 every 128). *bf16* is `precision=bf16`. Both begin with the same weights and see the same
batches. *Seed n*: the same from other initial weights, on the same batches.

Loss: mean of the training loss over the last {_END:.0%} of steps, and loss on the same held-out text at the end.
Gap: what it is above that of bf16 of the same length from the same weights, in % of it; of bf16 itself, that of its
first run: how far two runs of one precision are apart, the noise. +- is one standard error over batches, two runs'
weights taken as they are.
"""
_ABLATIONS = """## Without a part of the recipe

Shorter runs. *Unpromoted*: all products of a sum stay in the tensor cores' accumulator. *Per tensor*: one scale for
each tensor instead of one for each tile. *Block gradients*: gradients of linears' results in tiles of 128 x 128, with
which V3's authors saw a model of 16B parameters diverge (V3 report, appendix B.2).
"""
_GRADIENTS = """## One step's gradients

Of all weights together, against FP32 at the same weights on the same batches, half-way through a short BF16 run;
medians over batches. At other weights it is another figure: where attention has become sharp, several times as much
(docs/log.md, "why one step's gradients are 17% off"). Error: length of the difference; length: of the gradient itself.
*Exact sums*: FP8 with tiles added up in FP32 throughout.
"""


@dataclass(frozen=True)
class Row:
    """A run at its end. Gaps in %, None until bf16 of the same length is there."""

    name: str
    tokens: int
    loss: float
    gap: float | None
    gap_error: float | None
    held_out: float
    held_out_gap: float | None
    skipped: int
    seconds: float
    cpu_seconds: float


def twin_of(name: str) -> str:
    """What a run is compared with: BF16 of the same length, for FP8 of the same seed too."""
    base = name.removeprefix(SHORT)
    seed = base.removeprefix(FP8) if base.startswith(FP8) else ""
    return (SHORT if name.startswith(SHORT) else "") + BF16 + seed


def row(curve: Curve, curves: Mapping[str, Curve]) -> Row:
    count = window_of(curve)
    end_S, held_out = np.array(curve.losses[-count:]), curve.held_out[-1][1]
    gap = error = held_out_gap = None
    twin = curves.get(twin_of(curve.name))
    if twin is not None:
        other_S = np.array(twin.losses[-count:])
        difference_S = 100 * (end_S - other_S) / other_S.mean()
        gap, error = float(difference_S.mean()), float(difference_S.std() / count**0.5)
        held_out_gap = 100 * (held_out / twin.held_out[-1][1] - 1)
    return Row(
        curve.name,
        curve.tokens,
        float(end_S.mean()),
        gap,
        error,
        held_out,
        held_out_gap,
        curve.skipped,
        curve.seconds,
        curve.cpu_seconds,
    )


def gaps_along(curve: Curve, twin: Curve, window: int) -> NDArray[np.float64]:
    """The gap in % of means over ``window`` steps, from step ``window`` on."""
    kernel = np.full(window, 1 / window)
    one_S, other_S = (np.convolve(c.losses, kernel, "valid") for c in (curve, twin))
    return 100 * (one_S / other_S - 1)


def save(
    path: Path, facts: Mapping[str, str], curves: Mapping[str, Curve], errors: tuple[GradientError, ...]
) -> None:
    """``path`` and the same with .md."""
    rows = [row(curve, curves) for curve in curves.values()]
    found = {
        "facts": dict(facts),
        "runs": [asdict(one) for one in rows],
        "gradients": [asdict(one) for one in errors],
        "curves": [_rounded(curve) for curve in curves.values()],
    }
    path.write_text(json.dumps(found) + "\n")
    path.with_suffix(".md").write_text(report(facts, rows, errors, mean_gaps(curves)))


def load(path: Path) -> tuple[dict[str, Curve], tuple[GradientError, ...], str]:
    """Curves by name, gradients' errors and the revision that ``save`` left."""
    found = json.loads(path.read_text())
    curves = [
        Curve(**one | {"losses": tuple(one["losses"]), "held_out": tuple(map(tuple, one["held_out"]))})
        for one in found["curves"]
    ]
    errors = tuple(GradientError(**one) for one in found["gradients"])
    return {curve.name: curve for curve in curves}, errors, found["facts"]["revision"]


def _rounded(curve: Curve) -> dict[str, Any]:
    return asdict(curve) | {"losses": [round(loss, 5) for loss in curve.losses]}


def mean_gaps(curves: Mapping[str, Curve]) -> NDArray[np.float64] | None:
    """``gaps_along`` of FP8's long runs, over a window of the share that the end is, mean over seeds. None until there
    is one with its twin."""
    pairs = [(c, curves[twin_of(n)]) for n, c in curves.items() if n.startswith(FP8) and twin_of(n) in curves]
    if not pairs:
        return None
    return np.mean([gaps_along(one, twin, window_of(one)) for one, twin in pairs], axis=0)


def window_of(curve: Curve) -> int:
    """Steps that are averaged."""
    return max(1, round(_END * len(curve.losses)))


def _gaps(rows: list[Row], start: str) -> list[float]:
    return [r.gap for r in rows if r.gap is not None and r.name.removeprefix(SHORT).startswith(start)]


def report(
    facts: Mapping[str, str],
    rows: list[Row],
    errors: tuple[GradientError, ...],
    along_S: NDArray[np.float64] | None,
) -> str:
    """``along``: ``mean_gaps``."""
    parts = [_HEAD, "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    for short in (False, True):
        some = [r for r in rows if r.name.startswith(SHORT) == short]
        if some:
            parts += [_ABLATIONS] if short else []
            parts += [_table(some), _without(some) if short else _verdict(some, along_S)]
    parts += ["![Losses and gaps](fp8_loss_gap.png)"]
    if errors:
        lines = [(e.name, f"{e.error:.2%}", f"{e.worst:.2%}", f"{e.length:.3f}") for e in errors]
        parts += [_GRADIENTS, markdown.table(("precision", "error", "worst batch", "length"), lines)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _table(rows: list[Row]) -> str:
    head = "run", "tokens", "loss", "gap", "held out", "gap", "minutes", "CPU minutes"
    return markdown.table(
        head,
        [
            (
                r.name.removeprefix(SHORT),
                numbers.count(r.tokens),
                f"{r.loss:.4f}",
                _percent(r.gap, r.gap_error),
                f"{r.held_out:.4f}",
                _percent(r.held_out_gap),
                f"{r.seconds / 60:.1f}",
                f"{r.cpu_seconds / 60:.1f}",
            )
            for r in rows
        ],
    )


def _percent(gap: float | None, error: float | None = None) -> str:
    if gap is None or gap == 0:
        return ""
    return f"{gap:+.2f} %" + (f" +- {error:.2f}" if error is not None else "")


def _verdict(rows: list[Row], along_S: NDArray[np.float64] | None) -> str:
    """Of the long runs. What is larger than the noise counts as seen."""
    gaps, others = _gaps(rows, FP8), [abs(gap) for gap in _gaps(rows, f"{BF16}, ")]
    if not gaps or not others or along_S is None:
        return ""
    mean, floor = float(np.mean(gaps)), max(others)
    spread = f" +- {np.std(gaps, ddof=1) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
    count = f"mean of {len(gaps)} seeds" if len(gaps) > 1 else "one seed"
    late_S = along_S[len(along_S) // 2 :]
    return (
        f"Gap of fp8 at the end, {count}: **{mean:+.2f} %**{spread}; the goal, below {GOAL} %, is "
        f"{'reached' if mean < GOAL else 'missed'}. Noise, bf16 from other weights: up to {floor:.2f} %, "
        f"{'more' if floor > abs(mean) else 'less'} than the gap. In the second half the gap (means over "
        f"{_END:.0%} of the run) lies between {late_S.min():+.2f} and {late_S.max():+.2f} %."
    )


def _without(rows: list[Row]) -> str:
    """Of the ablations. An fp8 that ends below bf16 is luck: as much of the noise as bf16 from other weights is."""
    whole, others = _gaps(rows, FP8), [abs(gap) for gap in _gaps(rows, f"{BF16}, ")]
    if not whole or not others:
        return ""
    more = {
        r.name.removeprefix(SHORT): r.gap - whole[0]
        for r in rows
        if r.gap is not None and not r.name.removeprefix(SHORT).startswith((FP8, BF16))
    }
    floor = max(*others, -whole[0])
    seen, unseen = (
        ", ".join(f"{name} {gap:+.2f} %" for name, gap in more.items() if (gap > floor) == above)
        for above in (True, False)
    )
    text = f"Against fp8 of the same length, with a noise of {floor:.2f} %: "
    text += f"visible: {seen}. " if seen else "no known effect is visible at this size. "
    return text + (f"Not above the noise: {unseen}." if unseen else "")
