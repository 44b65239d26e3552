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
BF16 = "bf16"
GOAL = 0.25  # %: the V3 report's bound (section 3.3)
_END = 0.1  # of a run, over which the training loss is averaged at its end

_HEAD = f"""# What FP8 training loses

Made by `python -m benchmarks.fp8_loss_gap`: one small DeepSeek-V3 (MLA, a dense layer, MoE layers with shared expert
and balance biases), trained on real text in one process a run. *fp8* is `precision=fp8`, V3's recipe, with products
added up as Hopper's tensor cores do it (`accumulate: hopper`: 32 products at a time into an accumulator of 13 fraction
bits, promoted to FP32 every 128). *bf16* is `precision=bf16`. Both begin with the same weights and see the same
batches. *Seed n* is BF16 from other initial weights, on the same batches: how far two runs of one precision are apart,
the noise.

Loss: mean of the training loss over the last {_END:.0%} of steps, and loss on the same held-out text at the end.
Gap: what it is above that of bf16 of the same length, in % of it; +- is one standard error over batches, two runs'
weights taken as they are.
"""
_ABLATIONS = """## Without a part of the recipe

Shorter runs. *Unpromoted*: all products of a sum stay in the tensor cores' accumulator. *Per tensor*: one scale for
each tensor instead of one for each tile. *Block gradients*: gradients of linears' results in tiles of 128 x 128, with
which V3's authors saw a model of 16B parameters diverge (V3 report, appendix B.2).
"""
_GRADIENTS = """## One step's gradients

Of all weights together, against FP32 at the same weights on the same batch. Error: length of the difference; length:
that of the projection on FP32's gradient; below 1, gradients are systematically too short. *Exact sums*: FP8 with
tiles added up in FP32 throughout.
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
    """The BF16 run of the same length."""
    return (SHORT if name.startswith(SHORT) else "") + BF16


def row(curve: Curve, curves: Mapping[str, Curve]) -> Row:
    count = max(1, round(_END * len(curve.losses)))
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
    path.with_suffix(".md").write_text(report(facts, rows, errors, _along(curves)))


def _rounded(curve: Curve) -> dict[str, Any]:
    return asdict(curve) | {"losses": [round(loss, 5) for loss in curve.losses]}


def _along(curves: Mapping[str, Curve]) -> float | None:
    if not {"fp8", BF16} <= curves.keys():
        return None
    fp8, bf16 = curves["fp8"], curves[BF16]
    window = max(1, round(_END * len(fp8.losses)))
    gaps = gaps_along(fp8, bf16, window)
    return float(np.abs(gaps[len(gaps) // 2 :]).max())


def noise(rows: list[Row], *, short: bool) -> float | None:
    """The largest gap, either way, of BF16 from other weights."""
    start = (SHORT if short else "") + "bf16, seed"
    found = [abs(r.gap) for r in rows if r.name.startswith(start) and r.gap is not None]
    return max(found, default=None)


def report(
    facts: Mapping[str, str], rows: list[Row], errors: tuple[GradientError, ...], along: float | None
) -> str:
    parts = [_HEAD, "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    for short in (False, True):
        some = [r for r in rows if r.name.startswith(SHORT) == short]
        if some:
            parts += [_ABLATIONS] if short else []
            parts += [_table(some), _verdict(some, along, short=short)]
    parts += ["![Losses and gaps](fp8_loss_gap.png)"]
    if errors:
        lines = [(e.name, f"{e.error:.2%}", f"{e.length:.5f}") for e in errors]
        parts += [_GRADIENTS, markdown.table(("precision", "error", "length"), lines)]
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


def _verdict(rows: list[Row], along: float | None, *, short: bool) -> str:
    """What the figures say, by one rule: an effect is there where it is larger than the noise."""
    floor = noise(rows, short=short)
    gaps = {r.name.removeprefix(SHORT): r.gap for r in rows if r.gap is not None}
    if floor is None or "fp8" not in gaps:
        return ""
    if not short:
        text = (
            f"Gap of fp8 at the end: **{gaps['fp8']:+.2f} %**; the goal, below {GOAL} %, is "
            f"{'reached' if gaps['fp8'] < GOAL else 'missed'}. Noise: {floor:.2f} %, "
            f"{'more' if floor > abs(gaps['fp8']) else 'less'} than the gap."
        )
        return text + (
            f" Largest gap, either way, in the second half (means over {_END:.0%} of the run): {along:.2f} %."
            if along is not None
            else ""
        )
    more = {name: gap - gaps["fp8"] for name, gap in gaps.items() if not name.startswith(("fp8", BF16))}
    seen = [f"{name} {gap:+.2f} %" for name, gap in more.items() if gap > floor]
    unseen = [f"{name} {gap:+.2f} %" for name, gap in more.items() if gap <= floor]
    text = f"Against fp8 of the same length, with a noise of {floor:.2f} %: "
    text += f"visible: {', '.join(seen)}. " if seen else "nothing is visible at this size. "
    return text + (f"Not above the noise: {', '.join(unseen)}." if unseen else "")
