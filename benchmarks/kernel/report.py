"""Results as a table in Markdown and as JSON."""

import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from benchmarks.kernel.contest import Ceilings, Result


def facts(device: torch.device, revision: str | None = None) -> dict[str, str]:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU, interpreter)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "revision": revision or done.stdout.strip() or "unknown",
    }


def write(folder: Path, name: str, facts: dict[str, str], limits: Ceilings, results: list[Result]) -> str:
    """``name``.json and ``name``.md; returns the latter's text."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"facts": facts, "ceilings": asdict(limits), "results": [asdict(r) for r in results]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(facts, limits, results)
    (folder / f"{name}.md").write_text(text)
    return text


def table(facts: dict[str, str], limits: Ceilings, results: list[Result]) -> str:
    lines = [
        "# Kernels",
        "",
        ", ".join(f"{key} {value}" for key, value in facts.items()) + ".",
        f"Ceilings of the same run: copy {limits.bytes_per_second / 1e12:.2f} TB/s (read + written), cuBLAS BF16 "
        f"8192^3 {limits.bf16_flops / 1e12:.0f} TFLOP/s, cuBLAS FP8 with one scale a matrix "
        f"{limits.fp8_flops / 1e12:.0f} TFLOP/s.",
        "Medians, L2 flushed before every call. Of ceiling: the time of the fewest bytes, or of the operations, at the "
        "ceiling's rate, by the time taken. Of a copy: the same for a copy that moves as many bytes, in the same run.",
        "",
        "| op | shape | who | ms | rate | of ceiling | of a copy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        if r.ms is None:
            lines.append(f"| {r.op} | {r.shape} | {r.entry} | - | {r.note} | - | - |")
            continue
        unit = "GB/s" if r.bound == "memory" else "TFLOP/s"
        copy = "" if r.of_copy is None else f"{r.of_copy:.0%}"
        lines.append(
            f"| {r.op} | {r.shape} | {r.entry} | {r.ms:.4f} | {r.rate:.0f} {unit} | {r.of_ceiling or 0:.0%} | {copy} |"
        )
    return "\n".join(lines) + "\n"
