"""What FP8 training loses: one small DeepSeek-V3 trained from the same weights on the same text in BF16 and in V3's FP8
recipe, with Hopper's accumulation emulated; and what changes where a part of the recipe is left out.

    python -m benchmarks.fp8_loss_gap                        # 45 minutes on two cores; leave the machine alone
    python -m benchmarks.fp8_loss_gap --minutes 2 --ablation-minutes 1 --out FOLDER
    python -m benchmarks.fp8_loss_gap --steps 1200 --missing  # goes on where it was cut off
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.loss_gap import picture, report
from benchmarks.loss_gap.cases import ABLATIONS, BF16, FP8, SMALL, Case, Size
from benchmarks.loss_gap.gradients import gradient_errors
from benchmarks.loss_gap.training import Curve, Looks, seconds_per_step, train
from deepseek_train.config.schema import DataConfig
from deepseek_train.data.prepare import prepare
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.spec.weights import all_weights, count_active_parameters, count_parameters

RESULTS = Path(__file__).parent / "results"
SOURCE = "builtin:numpy+torch"
SEEDS = 3  # of the long runs
_CALIBRATION = 6  # steps
# All long, and all short runs on two cores, in runs of FP8; BF16's cost 0.4 of one.
_LONG_WORK, _SHORT_WORK = 2.1, 2.4


@dataclass(frozen=True)
class Plan:
    """What is trained on what, and for how long."""

    size: Size
    data: str
    steps: int
    short_steps: int
    looks: Looks = Looks()
    processes: int = 2  # 1: all runs in this one

    def cases(self) -> list[Case]:
        """The slow ones first."""
        long = [
            Case(name + (f", seed {seed}" if seed else ""), how, self.steps, seed)
            for name, how in ((report.FP8, FP8), (report.BF16, BF16))
            for seed in range(SEEDS)
        ]
        short = [Case(name, how, self.short_steps) for name, how in {report.FP8: FP8, **ABLATIONS}.items()]
        short += [replace(case, steps=self.short_steps) for case in long if case.precision is BF16][:2]
        return long + [replace(case, name=report.SHORT + case.name) for case in short]


def measure(plan: Plan, out: Path, missing: bool = False) -> None:
    """Writes ``out``/fp8_loss_gap.{json,md,png} after every run: the later ones may be given up. ``missing``: only
    those that are not there yet in the same length; gradients are taken as they are there."""
    path, facts, before = out / "fp8_loss_gap.json", _facts(plan), os.getloadavg()[0]
    found: dict[str, Curve] = {}
    if missing:
        there, errors, revision = report.load(path)
        found = {case.name: there[case.name] for case in plan.cases() if _is_there(case, there)}
        if revision != facts["revision"]:
            facts["revision"] += f"; of {', '.join(found)}: {revision}"
    else:
        errors = gradient_errors(plan.size, plan.data, plan.short_steps // 2, plan.short_steps)
    for curve in curves(plan, [case for case in plan.cases() if case.name not in found]):
        found[curve.name] = curve
        ordered = {case.name: found[case.name] for case in plan.cases() if case.name in found}
        load = {"load, before and after": f"{before:.1f}, {os.getloadavg()[0]:.1f}"}
        report.save(path, facts | load, ordered, errors)
        picture.draw(ordered, path.with_suffix(".png"))


def _is_there(case: Case, there: dict[str, Curve]) -> bool:
    return case.name in there and len(there[case.name].losses) == case.steps


def curves(plan: Plan, cases: list[Case]) -> Iterator[Curve]:
    """Each when it is finished, from a process of its own."""
    if plan.processes == 1:
        yield from (train(case, plan.size, plan.data, plan.looks) for case in cases)
        return
    with ProcessPoolExecutor(plan.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        running: list[Future[Curve]] = [
            pool.submit(train, case, plan.size, plan.data, plan.looks) for case in cases
        ]
        for one in as_completed(running):
            yield one.result()


def calibrated(size: Size, data: str) -> float:
    """Seconds of a step of FP8 beside a run of BF16."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        both = [
            pool.submit(seconds_per_step, Case("calibration", how, 1000), size, data, _CALIBRATION)
            for how in (FP8, BF16)
        ]
        return both[0].result()


def _facts(plan: Plan) -> dict[str, str]:
    facts, m = machine_facts(), plan.size.model
    return {
        "machine": f"{facts.cpu}, {facts.cores} cores; torch {dict(facts.versions)['torch']}",
        "revision": facts.git_revision or "unknown",
        "model": f"{count_parameters(all_weights(m)) / 1e6:.1f}M parameters, "
        f"{count_active_parameters(m) / 1e6:.1f}M active; hidden {m.hidden_size}, dense FFN {m.dense_ffn_size}, "
        f"{m.num_layers} layers, {m.num_dense_layers} of them dense, {m.num_routed_experts} experts of "
        f"{m.expert_ffn_size}, top {m.experts_per_token}",
        "text": f"{SOURCE}, a step {plan.size.sequences} x {plan.size.length} tokens, "
        f"{plan.steps} and {plan.short_steps} steps",
        "held out": f"the first {plan.looks.batches_at_end * plan.size.tokens} tokens of the split, at the end",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of the long runs, as a calibration tells"
    )
    parser.add_argument("--ablation-minutes", type=float, default=15.0)
    parser.add_argument("--steps", type=int, help="of the long runs, instead of a calibration")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--missing", action="store_true", help="only runs that are not in FOLDER yet")
    parser.add_argument("--data", default="datasets/loss_gap", help="folder, prepared if it is not there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for fp8_loss_gap.{json,md,png}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(DataConfig(args.data, source=SOURCE), SMALL.model.vocab_size, progress=True)
    steps = args.steps or max(1, int(args.minutes * 60 / _LONG_WORK / calibrated(SMALL, args.data)))
    short = max(1, int(steps * args.ablation_minutes / args.minutes * _LONG_WORK / _SHORT_WORK))
    measure(Plan(SMALL, args.data, steps, short, processes=args.processes), args.out, args.missing)
    print((args.out / "fp8_loss_gap.md").read_text())


if __name__ == "__main__":
    main()
