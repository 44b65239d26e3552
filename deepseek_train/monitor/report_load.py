"""The report's section on expert load: a table in numbers, and the pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from deepseek_train.monitor.imbalance import EVEN, LayerImbalance, even_since, imbalance
from deepseek_train.monitor.markdown import picture, table
from deepseek_train.monitor.metrics import StepMetrics
from deepseek_train.monitor.pictures.load import draw_expert_load, draw_max_violation, load_history


def load_section(run_dir: Path, steps: Sequence[StepMetrics]) -> list[str]:
    """Paragraphs, and pictures in ``run_dir/report``; nothing without a step that holds loads."""
    load, layers = load_history(steps), imbalance(steps)
    if load is None:
        return []
    violation = draw_max_violation(load, run_dir / "report" / "max_violation.png")
    experts = draw_expert_load(load, run_dir / "report" / "expert_load.png")
    return [
        "## Expert load",
        _words(layers, even_since(steps)),
        _layer_table(layers),
        picture(run_dir, violation, "MaxVio of each MoE layer over training"),
        picture(run_dir, experts, "Load of each expert over training"),
    ]


def _words(layers: Sequence[LayerImbalance], since: int | None) -> str:
    first, last = (statistics.fmean(getattr(one, tenth) for one in layers) for tenth in ("first", "last"))
    worst = max(layers, key=lambda one: one.last)
    settled = (
        f"not every layer is at {EVEN:g} or below at the end"
        if since is None
        else f"every layer is at {EVEN:g} or below from step {since} to the end"
    )
    return (
        "MaxVio is the busiest expert's tokens in the global batch of a step over the mean, minus 1; 0 is perfect. "
        f"It went from {first:.2f} in the first tenth of the run to {last:.2f} in the last, averaged over "
        f"{len(layers)} MoE layers; the worst layer of the last tenth is {worst.layer} with {worst.last:.2f}; "
        f"{settled}. Experts are those of the last step, load over the mean in brackets."
    )


def _layer_table(layers: Sequence[LayerImbalance]) -> str:
    head = ("layer", "MaxVio, first tenth", "middle tenth", "last tenth", "busiest expert", "idlest expert")
    rows = [
        (
            str(one.layer),
            f"{one.first:.3f}",
            f"{one.middle:.3f}",
            f"{one.last:.3f}",
            f"{one.busiest} ({one.busiest_load:.3f})",
            f"{one.idlest} ({one.idlest_load:.3f})",
        )
        for one in layers
    ]
    return table(head, rows)
