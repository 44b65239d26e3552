"""What FP8 training loses: one small DeepSeek-V3 trained from the same weights on the same text in BF16 and in V3's FP8
recipe, with Hopper's accumulation emulated; and what changes where a part of the recipe is left out.

    python -m benchmarks.fp8_loss_gap                        # 45 minutes on two cores; leave the machine alone
    python -m benchmarks.fp8_loss_gap --minutes 1 --ablation-minutes 1 --out FOLDER
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.loss_gap.cases import ABLATIONS, BF16, FP8, SMALL, Case, Size
from benchmarks.loss_gap.training import Curve, Looks, seconds_per_step, train
from deepseek_train.config.schema import DataConfig
from deepseek_train.data.prepare import prepare

RESULTS = Path(__file__).parent / "results"
PROCESSES = 2
SHORT = "short, "
_CALIBRATION = 6  # steps
_SHORT_WORK = 2.5  # the ablations' runs in runs of FP8, on two cores


def long_cases(steps: int) -> list[Case]:
    others = [Case(f"bf16, seed {seed}", BF16, steps, seed) for seed in (1, 2)]
    return [Case("fp8", FP8, steps), Case("bf16", BF16, steps), *others]


def short_cases(steps: int) -> list[Case]:
    cases = [Case("fp8", FP8, steps), *(Case(name, how, steps) for name, how in ABLATIONS.items())]
    cases += [Case("bf16", BF16, steps), Case("bf16, seed 1", BF16, steps, 1)]
    return [replace(case, name=SHORT + case.name) for case in cases]


def curves(cases: list[Case], size: Size, data: str, looks: Looks) -> Iterator[Curve]:
    """Each when it is finished; two at a time, each in a process of its own."""
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), max_tasks_per_child=1) as pool:
        running: list[Future[Curve]] = [pool.submit(train, case, size, data, looks) for case in cases]
        for one in as_completed(running):
            yield one.result()


def calibrated(size: Size, data: str) -> float:
    """Seconds of a step of FP8 beside a run of BF16."""
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        both = [
            pool.submit(seconds_per_step, Case("calibration", how, 1000), size, data, _CALIBRATION)
            for how in (FP8, BF16)
        ]
        return both[0].result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of the long runs, as a calibration tells"
    )
    parser.add_argument("--ablation-minutes", type=float, default=15.0)
    parser.add_argument("--steps", type=int, help="of the long runs, instead of a calibration")
    parser.add_argument(
        "--data", type=Path, default=Path("datasets/loss_gap"), help="prepared if it is not there"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for fp8_loss_gap.{json,md,png}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(DataConfig(str(args.data), source="builtin:numpy+torch"), SMALL.model.vocab_size)
    steps = args.steps or int(args.minutes * 60 / calibrated(SMALL, str(args.data)))
    short = max(1, int(steps * args.ablation_minutes / args.minutes / _SHORT_WORK))
    print(f"{steps} steps, {short} of short runs", flush=True)
    found = []
    for curve in curves([*long_cases(steps), *short_cases(short)], SMALL, str(args.data), Looks()):
        found.append(curve)
        (args.out / "fp8_loss_gap.json").write_text(json.dumps([asdict(c) for c in found]) + "\n")


if __name__ == "__main__":
    main()
