"""A training step of DeepSeek-V3's layers on one GPU: FP8 beside BF16 beside plain torch, in one process, one after the
other.

    PYTHONPATH=kernels:. python3 -m benchmarks.gpu_step         # needs torch, triton, pyyaml, numpy and this repository

Every entry trains the model of ``configs/model/h100_proxy.yaml`` on the same tokens, from the same weights, in steps
of four micro-batches of 2 x 4096 tokens: forward, backward, weight gradients, clipping, AdamW, router biases. Writes
benchmarks/results/gpu_step.{json,md} (``--out``: another folder). ``--rehearse`` (and no GPU): tiny, on the CPU,
kernels interpreted; nothing is written unless ``--out`` is given, and its times mean nothing.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from benchmarks.gpu.backends import chosen_kernels
from benchmarks.gpu.report import table, write
from benchmarks.gpu.step_race import Limits, race
from benchmarks.gpu.trainer import Entry, Task, shipped_model
from benchmarks.kernel.report import facts
from deepseek_kernels.choice import Kernels
from deepseek_train.config.schema import Fp8Config

RESULTS = Path(__file__).parent / "results"
NAMES = ("fp8", "bf16", "bf16-unfused", "fp8-unfused", "fp8-compiled")


def entries(device_type: str) -> dict[str, Entry]:
    """fp8, bf16: the backends that a run gets by itself. unfused: plain torch, but for attention, whose plain form
    holds all scores at once, 17 GB a sequence. compiled: with train.compile."""
    chosen = chosen_kernels(device_type)
    plain = Kernels(attention="torch") if device_type == "cuda" else Kernels()
    v3 = Fp8Config()
    kinds = (chosen, v3), (chosen, None), (plain, None), (plain, v3), (chosen, v3, True)
    return {name: Entry(name, *kind) for name, kind in zip(NAMES, kinds, strict=True)}


def task(rehearse: bool, microbatches: int) -> Task:
    model = shipped_model("h100_proxy")
    if not rehearse:
        return Task(model, 4096, 2, microbatches)
    small = replace(
        model,
        vocab_size=128,
        hidden_size=128,
        num_layers=2,
        num_heads=1,
        q_lora_rank=128,
        kv_lora_rank=128,
        num_routed_experts=8,
        experts_per_token=4,
        dense_ffn_size=128,
        expert_ffn_size=128,
    )
    return Task(small, 32, 1, microbatches)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--entries", nargs="+", choices=NAMES, default=[*NAMES[:3], "fp8-compiled"])
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of an entry, after its first step (which compiles)"
    )
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="also what each kernel of a step takes")
    parser.add_argument("--revision", help="of the sources, where there is no git to ask")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    rehearse = given.rehearse or not torch.cuda.is_available()
    device = torch.device("cpu" if rehearse else "cuda")
    what, known = task(rehearse, given.microbatches), entries(device.type)
    limits = Limits(0.0) if rehearse else Limits(given.seconds)
    about, results = facts(device, given.revision), []
    for name in given.entries:
        results.append(race(what, known[name], device, limits, given.profile))
        print(results[-1].line(), flush=True)
        if given.out or not rehearse:  # after every entry: a later one may be cut off
            write(given.out or RESULTS, about, what, results)
    print(table(about, what, results))


if __name__ == "__main__":
    main()
