"""One MoE layer of DeepSeek-V3 on one rank of EP64, forward and backward, in FP8 and in BF16, in the same run.

    PYTHONPATH=kernels:. python3 -m benchmarks.moe_layer        # needs torch, triton, numpy and this repository

4 experts with 8192 rows each and the shared expert on 4096 tokens: sorting, quantising, products, SwiGLU, sums, weight
gradients into FP32; what travels between ranks is not in it. FP8 is ``deepseek_train.fp8`` with V3's recipe, BF16
torch's grouped products and cuBLAS with our kernels around them. Writes benchmarks/results/moe_layer.{json,md}
(``--out``: another folder). ``--rehearse`` (and no GPU): small, on the CPU, interpreted; nothing is written unless
``--out`` is given.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from benchmarks.gpu.backends import chosen_kernels
from benchmarks.gpu.moe_work import Given, Layer, Made, bf16_pass, fp8_pass, given
from benchmarks.gpu.profile import KernelTime, kernel_table, kernel_times
from benchmarks.kernel.measure import median_ms
from benchmarks.kernel.report import facts
from deepseek_train.phases.wgrad import Weight

RESULTS = Path(__file__).parent / "results"
GOAL = 1.4  # times as fast as BF16
FAR = 0.15  # FP8 may be off by this share of a norm; after three products in a row, 8% is usual


def difference(a: Made, b: Made) -> float:
    """The largest |a - b| / |b| of all that a pass gives."""
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs)


def weights_of(g: Given) -> list[Weight]:
    return [g.gate_up, g.down, g.shared_gate_up, g.shared_down]


@dataclass(frozen=True)
class Result:
    facts: dict[str, str]
    kernels: str
    layer: Layer
    fp8_ms: float
    bf16_ms: float
    difference: float  # of results
    gradient_difference: float  # of weights' gradients
    profiles: dict[str, list[KernelTime]]

    @property
    def ratio(self) -> float:
        """How many times as fast as BF16."""
        return self.bf16_ms / self.fp8_ms

    def tflops(self, ms: float) -> float:
        return self.layer.flops / ms / 1e9


def words(r: Result) -> str:
    """The result as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in {**r.facts, "kernels": r.kernels}.items())
    lines = [
        "# One MoE layer on one rank of EP64",
        "",
        f"{about}.",
        f"{r.layer}: forward, backward and weight gradients. Medians, L2 flushed before every pass.",
        "",
        f"FP8 {r.fp8_ms:.3f} ms ({r.tflops(r.fp8_ms):.0f} TFLOP/s), BF16 {r.bf16_ms:.3f} ms "
        f"({r.tflops(r.bf16_ms):.0f} TFLOP/s): FP8 is {r.ratio:.2f} times as fast (goal {GOAL}). Results differ by "
        f"{100 * r.difference:.1f}% at most, weight gradients by {100 * r.gradient_difference:.1f}%.",
    ]
    for name, rows in r.profiles.items():
        lines += ["", f"Kernels of one pass in {name}:", "", kernel_table(rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--milliseconds", type=int, default=1500, help="of each contestant, after its warm-up"
    )
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
    found = Result(
        facts(device, asked.revision),
        str(kernels),
        layer,
        ms["FP8"],
        ms["BF16"],
        off,
        gradient_difference,
        {name: kernel_times(call, device) for name, call in passes.items()},
    )
    text = words(found)
    print(text)
    if asked.out or not rehearse:
        folder = asked.out or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        content = {**asdict(found), "ratio": found.ratio}
        (folder / "moe_layer.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "moe_layer.md").write_text(text)


if __name__ == "__main__":
    main()
