"""Tokens per second of a training step on one CPU process: ours beside transformers' DeepseekV3, plain loop.

Forward, backward, clipping and AdamW of the same weights on the same batches, MTP off. All live in
one process and take turns (A B C A B C ...), so that whatever else the machine does hits them alike; medians.

    python -m benchmarks.step --sizes tiny small --threads 2 1
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn import functional

from deepseek_train.config.parse import parse
from deepseek_train.config.schema import CurveConfig, ModelConfig, OptimConfig
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.optim.replicated import Replicated
from deepseek_train.parallel.p2p import Links
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary, LossScales
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.spec.stages import split_layers
from deepseek_train.spec.weights import all_weights, count_active_parameters, count_parameters
from tests.helpers.hf import hf_model, published
from tests.helpers.models import table_tensors

RESULTS = Path(__file__).parent / "results"
LR = 1e-4
_FLAT = CurveConfig(0.0)
OPTIM = OptimConfig(lr=_FLAT, batch_size=_FLAT, balance_speed=_FLAT, mtp_weight=_FLAT)
Step = Callable[[Tensor], float]  # tokens [B, T + 1] -> loss


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def _shipped(name: str, **changes: int) -> ModelConfig:
    path = Path(__file__).parents[1] / "configs" / "model" / f"{name}.yaml"
    return replace(parse(ModelConfig, yaml.safe_load(path.read_text())), mtp_depth=0, **changes)


SIZES = {
    "tiny": Size(_shipped("tiny"), batch=8, length=128),  # what `make train` trains
    "small": Size(
        _shipped("tiny", hidden_size=256, num_layers=4, dense_ffn_size=768, num_routed_experts=16),
        batch=4,
        length=256,
    ),
    "v3-like": Size(  # the routing of DeepSeek-V3 (top 8 in 4 of 8 groups) and longer sequences
        _shipped(
            "tiny",
            num_routed_experts=64,
            experts_per_token=8,
            num_expert_groups=8,
            expert_groups_per_token=4,
            expert_ffn_size=32,
        ),
        batch=2,
        length=1024,
    ),
}


@dataclass(frozen=True)
class Result:
    size: str
    threads: int
    contestant: str
    step_ms: float  # wall clock, median over the rounds
    cpu_ms: float  # CPU time of the process, median: what remains meaningful on a shared machine
    tokens_per_second: float  # by the wall clock
    speed_over_eager: float  # wall clock, against transformers with eager attention and experts
    cpu_speed_over_eager: float
    rounds: int


def ours(stage: Stage, size: Size) -> Step:
    """Executor over a one-rank 1F1B schedule, the optimizer of one rank."""
    m = size.model
    decayed = {w.name for w in all_weights(m) if w.decayed}
    groups = [
        WeightGroup({n: w for n, w in stage.weights().items() if (n in decayed) == flag}, None, decay)
        for flag, decay in ((True, OPTIM.weight_decay), (False, 0.0))
    ]
    optimizer = Replicated(groups, None, OPTIM, torch.float32)
    boundary = Boundary((size.batch, size.length, m.hidden_size), torch.float32, torch.device("cpu"))
    links = Links({}, ranks=(0,), me=0)  # one rank sends nothing
    executor = Executor({0: stage}, links, stage.context.queue, boundary)
    schedule = PreparedSchedule(make_schedule("1f1b", 1, 1), 0)
    scales = LossScales(main=1.0, mtp=0.0, balance=0.0)

    def step(tokens: Tensor) -> float:
        ran = executor.run(schedule, lambda _: MicroBatch(tokens), scales)
        optimizer.reduce()
        optimizer.step(LR)
        return float(ran.main[0])

    return step


def theirs(state: Mapping[str, Tensor], size: Size, attention: str, experts: str) -> Step:
    """The loop of a tutorial."""
    model = hf_model(size.model, state, attention=attention, experts=experts).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)

    def step(tokens: Tensor) -> float:
        logits = model(tokens[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def contestants(size: Size) -> dict[str, Step]:
    m = size.model
    stage = Stage(ModelContext(m, WeightGradQueue()), split_layers(m, 1)[0], size.length)
    init_stage(stage, m, seed=0)
    state = published(table_tensors(stage), m)
    return {
        "deepseek_train": ours(stage, size),
        "transformers eager": theirs(state, size, "eager", "eager"),
        "transformers default": theirs(state, size, "sdpa", "grouped_mm"),
    }


def race(name: str, threads: int, rounds: int) -> list[Result]:
    """Two rounds of warm-up, then ``rounds`` that count. The losses must agree all the way."""
    torch.set_num_threads(threads)
    size, generator = SIZES[name], torch.Generator().manual_seed(0)
    steps = contestants(size)
    wall: dict[str, list[float]] = {who: [] for who in steps}
    cpu: dict[str, list[float]] = {who: [] for who in steps}
    for number in range(rounds + 2):
        tokens = torch.randint(size.model.vocab_size, (size.batch, size.length + 1), generator=generator)
        losses = []
        for who, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            losses.append(step(tokens))
            if number >= 2:
                wall[who].append(time.perf_counter() - start)
                cpu[who].append(time.process_time() - cpu_start)
        if max(losses) - min(losses) > 1e-3:
            raise RuntimeError(
                f"round {number}: the losses {losses} differ, so the steps are not the same work"
            )
    walls = {who: statistics.median(times) for who, times in wall.items()}
    cpus = {who: statistics.median(times) for who, times in cpu.items()}
    eager = "transformers eager"
    return [
        Result(
            size=name,
            threads=threads,
            contestant=who,
            step_ms=1e3 * walls[who],
            cpu_ms=1e3 * cpus[who],
            tokens_per_second=size.tokens / walls[who],
            speed_over_eager=walls[eager] / walls[who],
            cpu_speed_over_eager=cpus[eager] / cpus[who],
            rounds=rounds,
        )
        for who in steps
    ]


def machine() -> dict[str, str]:
    facts = machine_facts()
    return {
        "cpu": f"{facts.cpu}, {facts.cores} cores",
        **dict(facts.versions),
        "transformers": version("transformers"),
        "revision": facts.git_revision or "unknown",
    }


def table(results: list[Result]) -> str:
    lines = [
        "| size | threads | step | ms | CPU ms | tokens/s | x eager | x eager, CPU |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.size} | {r.threads} | {r.contestant} | {r.step_ms:.1f} | {r.cpu_ms:.1f} "
        f"| {r.tokens_per_second:.0f} | {r.speed_over_eager:.2f} | {r.cpu_speed_over_eager:.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def report(results: list[Result], where: dict[str, str]) -> str:
    sizes = []
    for name in dict.fromkeys(r.size for r in results):
        size, weights = SIZES[name], all_weights(SIZES[name].model)
        sizes.append(
            f"- {name}: {count_parameters(weights) / 1e6:.1f}M parameters, "
            f"{count_active_parameters(size.model) / 1e6:.1f}M active; "
            f"{size.batch} x {size.length} tokens a step"
        )
    facts = "\n".join(f"- {key}: {value}" for key, value in where.items())
    return (
        "# A training step on one process\n\nForward, backward, clipping, AdamW in FP32; made by "
        "`python -m benchmarks.step`. Medians of interleaved rounds.\n\n"
        f"{facts}\n" + "\n".join(sizes) + f"\n\n{table(results)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--threads", nargs="+", type=int, default=sorted({os.cpu_count() or 1, 1}, reverse=True)
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for step.json and step.md")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    where = machine()
    results: list[Result] = []
    for name in args.sizes:
        for threads in args.threads:
            results += race(name, threads, args.rounds)
            # after every race: on a busy machine the later ones may be given up
            found = {**where, "results": [asdict(r) for r in results]}
            (args.output / "step.json").write_text(json.dumps(found, indent=2) + "\n")
            (args.output / "step.md").write_text(report(results, where))
    print(table(results))


if __name__ == "__main__":
    main()
