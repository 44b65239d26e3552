"""Training steps as a table in Markdown and as JSON."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.profile import kernel_table
from benchmarks.gpu.step_race import Result
from benchmarks.gpu.trainer import Task
from deepseek_train.spec import work
from deepseek_train.spec.weights import all_weights, count_parameters

AGREE = 0.02  # FP8's losses may differ from BF16's by this share


def write(folder: Path, facts: dict[str, str], task: Task, results: list[Result]) -> None:
    """gpu_step.json and gpu_step.md."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"facts": facts, "task": asdict(task), "results": [asdict(r) for r in results]}
    (folder / "gpu_step.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu_step.md").write_text(table(facts, task, results))


def loss_words(results: list[Result]) -> str:
    """Whether all entries learn alike: the largest difference of a step, over the first entry's loss."""
    ran = [r for r in results if r.step_ms is not None]
    if len(ran) < 2:
        return ""
    first, worst = ran[0], 0.0
    for other in ran[1:]:
        pairs = zip(first.losses, other.losses, strict=False)  # the slower one took fewer steps
        # a NaN is worse than any number
        worst = max([worst, *(d if (d := abs(a - b) / a) == d else float("inf") for a, b in pairs)])
    verdict = "within" if worst <= AGREE else "NOT within"
    return f"Losses of all entries differ by {100 * worst:.2f}% at most, {verdict} {100 * AGREE:g}%."


def table(facts: dict[str, str], task: Task, results: list[Result]) -> str:
    m = task.model
    flops = work.training(m, task.sequence_length).total
    lines = [
        "# A training step on one GPU",
        "",
        ", ".join(f"{key} {value}" for key, value in facts.items()) + ".",
        f"{m.name}: {count_parameters(all_weights(m)) / 1e9:.2f}B parameters, {flops / 1e9:.2f} GFLOP a token, forward "
        f"and backward (causal count); steps of {task.microbatches} micro-batches of {task.sequences} x "
        f"{task.sequence_length} tokens, AdamW and router biases included. MFU against the BF16 peak. Unfused: plain "
        "torch but for attention.",
        "",
        "| entry | linears | kernels | ms | tokens/s | TFLOP/s | MFU | peak GiB | x first | loss, first and last |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    fastest = next((r.step_ms for r in results if r.step_ms is not None), None)
    for r in results:
        if r.step_ms is None or fastest is None:
            note = " ".join(r.note.replace("|", "/").split())
            lines.append(f"| {r.entry} | {r.linears} | {r.kernels} | - | {note} | | | | | |")
            continue
        mfu = "-" if r.mfu is None else f"{100 * r.mfu:.1f}%"
        lines.append(
            f"| {r.entry} | {r.linears} | {r.kernels} | {r.step_ms:.1f} | {r.tokens_per_second:.0f} | {r.tflops:.4g} "
            f"| {mfu} | {r.peak_gib:.1f} | {r.step_ms / fastest:.2f} | {r.losses[0]:.4f}, {r.losses[-1]:.4f} "
            f"({len(r.losses)} steps) |"
        )
    lines += ["", loss_words(results)]
    for r in results:
        if r.profile:
            lines += ["", f"Kernels of one step, {r.entry}:", "", kernel_table(r.profile)]
    return "\n".join(lines) + "\n"
