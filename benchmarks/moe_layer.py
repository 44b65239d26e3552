"""One MoE layer of DeepSeek-V3 on one rank of EP64, forward and backward, in FP8 and in BF16, in the same run.

    PYTHONPATH=kernels:. python3 -m benchmarks.moe_layer        # needs torch, triton, numpy and this repository

4 experts with 8192 rows each and the shared expert on 4096 tokens: sorting, quantising, products, SwiGLU, sums, weight
gradients into FP32; what travels between ranks is not in it. FP8 is ``deepseek_train.fp8`` with V3's recipe, BF16 torch's
grouped products and cuBLAS with our kernels around them. Writes benchmarks/results/moe_layer.{json,md} (``--out``:
another folder). ``--rehearse`` (and no GPU): small, on the CPU, interpreted; nothing is written unless ``--out`` is given.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from benchmarks.gpu.backends import chosen_kernels
from benchmarks.gpu.moe_work import Given, Layer, Made, bf16_pass, fp8_pass, given
from benchmarks.gpu.profile import kernel_table, kernel_times
from benchmarks.kernel.measure import median_ms
from benchmarks.kernel.report import facts
from deepseek_train.phases.wgrad import Weight

RESULTS = Path(__file__).parent / "results"
GOAL = 1.4  # times as fast as BF16
FAR = 0.1  # FP8's results may be off by this share of their norm (three products of E4M3 in a row: some 4%)


def difference(a: Made, b: Made) -> float:
    """The largest |a - b| / |b| of all that a pass gives."""
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs)


def weights_of(g: Given) -> list[Weight]:
    return [g.gate_up, g.down, g.shared_gate_up, g.shared_down]


def words(content: dict[str, object], tables: dict[str, str]) -> str:
    """The results as Markdown."""
    about, layer = content["facts"], content["layer"]
    assert isinstance(about, dict)
    lines = [
        "# One MoE layer on one rank of EP64",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
        f"{layer}: forward, backward and weight gradients. Medians, L2 flushed before every pass.",
        "",
        f"FP8 {content['fp8_ms']:.3f} ms ({content['fp8_tflops']:.0f} TFLOP/s), BF16 {content['bf16_ms']:.3f} ms "
        f"({content['bf16_tflops']:.0f} TFLOP/s): FP8 is {content['ratio']:.2f} times as fast (goal {GOAL}). Results "
        f"differ by {100 * content['difference']:.1f}% at most, weight gradients by "  # type: ignore[operator]
        f"{100 * content['gradient_difference']:.1f}%.",  # type: ignore[operator]
    ]
    for name, text in tables.items():
        lines += ["", f"Kernels of one pass in {name}:", "", text]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--milliseconds", type=int, default=1500, help="of each contestant, after its warm-up")
    parser.add_argument("--revision", help="of the sources, where there is no git to ask")
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    rehearse = asked.rehearse or not torch.cuda.is_available()
    device = torch.device("cpu" if rehearse else "cuda")
    layer = Layer(hidden=128, inner=128, rows=40, tokens=16, doubles=8) if rehearse else Layer()
    kernels, g = chosen_kernels(device.type), given(layer, device)
    passes = {"FP8": fp8_pass(g, kernels), "BF16": bf16_pass(g, kernels)}

    made, gradients = {}, {}
    for name, call in passes.items():
        made[name] = call()
        gradients[name] = [w.main_grad.clone() for w in weights_of(g)]
        for w in weights_of(g):
            w.main_grad.zero_()
    gradient_difference = max(
        float((a - b).norm() / b.norm()) for a, b in zip(gradients["FP8"], gradients["BF16"], strict=True)
    )
    off = difference(made["FP8"], made["BF16"])
    print(f"FP8 and BF16 differ by {100 * off:.2f}%, weight gradients by {100 * gradient_difference:.2f}%")
    if not max(off, gradient_difference) < FAR:
        raise RuntimeError("FP8 and BF16 do not compute the same layer")
    del made, gradients

    ms = {name: median_ms(call, device, asked.milliseconds) for name, call in passes.items()}
    profiles = {name: kernel_times(call, device) for name, call in passes.items()}
    content: dict[str, object] = {
        "facts": {**facts(device, asked.revision), "kernels": str(kernels)},
        "layer": asdict(layer),
        "fp8_ms": ms["FP8"],
        "bf16_ms": ms["BF16"],
        "ratio": ms["BF16"] / ms["FP8"],
        "fp8_tflops": layer.flops / ms["FP8"] / 1e9,
        "bf16_tflops": layer.flops / ms["BF16"] / 1e9,
        "difference": off,
        "gradient_difference": gradient_difference,
        "profiles": {name: [asdict(r) for r in rows] for name, rows in profiles.items()},
    }
    text = words(content, {name: kernel_table(rows) for name, rows in profiles.items()})
    print(text)
    if asked.out or not rehearse:
        folder = asked.out or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "moe_layer.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "moe_layer.md").write_text(text)


if __name__ == "__main__":
    main()
