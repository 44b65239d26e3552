"""Tokens per second of CPU time when one process generates text, with the latent cache and without.

The shipped tiny model, FP32, random weights, greedy. Both continue the same text in one process and take turns; at each
context length, medians of the CPU time that one further token takes (what else the machine does is not counted).
Without: the training model reads the whole text again for every token. Their tokens must agree.

    python -m benchmarks.generate
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from deepseek_train.config.parse import parse
from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.context import ModelContext
from deepseek_train.model.decode import LatentCache, cached_elements, decode
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.phases.phase import fold
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.spec.stages import split_layers

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Result:
    context: int  # tokens, the new ones included
    with_cache_ms: float  # one further token
    without_ms: float
    prefill_ms: float  # the context at once, into the cache
    tokens_per_second: float
    tokens_per_second_without: float
    speed_up: float


def make_stage(m: ModelConfig, length: int) -> Stage:
    stage = Stage(ModelContext(m, WeightGradQueue()), split_layers(m, 1)[0], length)
    init_stage(stage, m, seed=0)
    return stage


def timed(run: Callable[[], Tensor]) -> tuple[float, int]:
    """Milliseconds of CPU time, and the likeliest next token."""
    begun = time.process_time()
    logits_V = run()
    return 1e3 * (time.process_time() - begun), int(logits_V.argmax())


@torch.no_grad()
def race(stage: Stage, context: int, rounds: int) -> Result:
    """The last ``rounds`` tokens of ``context``, each made in both ways."""
    m = stage.context.model
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(m.vocab_size, (context - rounds,), generator=generator).tolist()
    cache = LatentCache(m, 1, context, torch.float32, CPU)

    def with_cache(unread: list[int]) -> Tensor:
        return stage.logits(decode(stage, torch.tensor([unread]), cache))[0, -1]

    def without(ids: list[int]) -> Tensor:
        hidden = fold(stage.trunk, MicroBatch(torch.tensor([[*ids, 0]])))
        return stage.logits(hidden.moved_to(hidden.x_BTD[:, -1:]))[0, 0]

    without(ids)  # warm-up
    prefill_ms, token = timed(lambda: with_cache(ids))
    fast, slow = [], []
    for _ in range(rounds):
        ids.append(token)
        ms, token = timed(lambda: with_cache(ids[-1:]))
        fast.append(ms)
        ms, other = timed(lambda: without(ids))
        slow.append(ms)
        if token != other:
            raise RuntimeError(f"at {len(ids)} tokens: {token} with the cache, {other} without it")
    one, whole = statistics.median(fast), statistics.median(slow)
    return Result(context, one, whole, prefill_ms, 1e3 / one, 1e3 / whole, whole / one)


def report(results: list[Result], m: ModelConfig) -> str:
    facts = machine_facts()
    full = m.num_layers * m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim)
    about = {
        "cpu": f"{facts.cpu}, {facts.cores} cores; one thread",
        **dict(facts.versions),
        "revision": facts.git_revision or "unknown",
        "model": f"{m.name}, {m.num_layers} layers, FP32, batch 1",
        "cache": f"{cached_elements(m)} elements a token in all layers; keys and values of all heads would be {full}",
    }
    lines = [
        "| context | ms a token, cache | ms a token, without | tokens/s, cache | tokens/s, without | x | prefill, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r.context} | {r.with_cache_ms:.2f} | {r.without_ms:.2f} | {r.tokens_per_second:.0f} "
            f"| {r.tokens_per_second_without:.0f} | {r.speed_up:.1f} | {r.prefill_ms:.1f} |"
            for r in results
        ),
    ]
    told = "\n".join(f"- {key}: {value}" for key, value in about.items())
    return (
        "# Generating with and without the latent cache\n\nMade by `python -m benchmarks.generate`. Medians of CPU "
        f"time over interleaved tokens; both ways make the same ones.\n\n{told}\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for generate.json and .md")
    args = parser.parse_args()
    if min(args.contexts) < args.rounds + 2:
        parser.error(f"--contexts of at least {args.rounds + 2} tokens, or fewer --rounds")
    torch.set_num_threads(1)
    path = Path(__file__).parents[1] / "configs" / "model" / "tiny.yaml"
    m = replace(parse(ModelConfig, yaml.safe_load(path.read_text())), mtp_depth=0)
    stage = make_stage(m, max(args.contexts))
    results = [race(stage, context, args.rounds) for context in args.contexts]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "generate.json").write_text(
        json.dumps({"results": [asdict(r) for r in results]}, indent=2) + "\n"
    )
    text = report(results, m)
    (args.output / "generate.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
