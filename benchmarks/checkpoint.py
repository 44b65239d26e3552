"""What saving and loading costs beside torch.save and torch.distributed.checkpoint (DCP), same state, same run.

    python -m benchmarks.checkpoint                    # two ranks of 200 MiB, a few minutes
    python -m benchmarks.checkpoint --mebibytes 20 --rounds 2 --out FOLDER

Ours checksums everything, fsyncs files and folders and verifies before it loads; the others do not (torch.save is given
the fsync). Files come back from the page cache: loading is not a measurement of a disk.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.checkpointing.contenders import Sample, measure
from deepseek_train.monitor import markdown
from deepseek_train.monitor.machine import machine_facts
from tests.harness import run_ranks

RESULTS = Path(__file__).parent / "results"
PATIENCE = 1200  # seconds


def report(found: dict[str, list[Sample]], mebibytes: int, ranks: int) -> str:
    """The table. The first round is shown apart: memory and files are new then."""
    rows = []
    for name, samples in found.items():
        stall, save, load = (
            statistics.median(getattr(sample, key) for sample in samples[1:])
            for key in ("stall", "save", "load")
        )
        save_rate, load_rate = (f"{mebibytes * 2**20 / seconds / 1e6:,.0f}" for seconds in (save, load))
        first = f"{samples[0].stall:.3f}"
        rows.append((name, first, f"{stall:.3f}", f"{save:.2f}", save_rate, f"{load:.2f}", load_rate))
    head = (
        "way",
        "first stall, s",
        "stall, s",
        "saved after, s",
        "MB/s a rank",
        "loaded after, s",
        "MB/s a rank",
    )
    facts, rounds = machine_facts(), len(next(iter(found.values()))) - 1
    return f"""# Saving and loading

Made by `python -m benchmarks.checkpoint`: {ranks} ranks of {mebibytes} MiB of FP32 state on {facts.cpu},
{facts.cores} cores; torch {dict(facts.versions)["torch"]}; revision {facts.git_revision or "unknown"}. Medians of
{rounds}
rounds after the first, all ways in turns; of the slowest rank. Stall: what training waits for.

{markdown.table(head, rows)}

Ours writes and fsyncs safetensors with an xxh3 checksum of every byte, and verifies all of it before it loads.
torch.save is given an fsync; DCP fsyncs. Neither has checksums. Loads come from the page cache.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mebibytes", type=int, default=200, help="of state on each rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6, help="the first is shown apart")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for checkpoint.{json,md}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
        found: dict[str, list[Sample]] = run_ranks(
            measure, args.ranks, args.mebibytes, args.rounds, Path(folder), timeout=PATIENCE
        )[0]
    text = report(found, args.mebibytes, args.ranks)
    (args.out / "checkpoint.md").write_text(text)
    samples = {name: [asdict(one) for one in several] for name, several in found.items()}
    (args.out / "checkpoint.json").write_text(json.dumps(samples, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
