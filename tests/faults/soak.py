"""A soak: one small run suffers faults drawn from a seed, is started again as often as need be, and has to end in the
bits of a run that nothing befell. What the faults cost goes to ``benchmarks/results/soak.{json,md}``.

    python -m tests.faults.soak --faults 30 --seed 0
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from deepseek_train.checkpoint.store import newest
from deepseek_train.checkpoint.stored import StoredCheckpoint
from deepseek_train.config.exit_codes import ExitCode
from tests.faults.commands import SMALL, numbers, write_text
from tests.faults.soak_plan import Fault, plan
from tests.faults.soak_report import Life, Soak, measured, write_report

EVERY = 3  # steps between two checkpoints
RANKS = {2: ["parallel.dp=1", "parallel.ep=1"], 4: ["parallel.dp=2", "parallel.ep=2"]}
PATIENCE = 400.0  # seconds, of one command
# Light, as the command itself is.
COMMAND = (
    "import sys; from deepseek_train.cli import train; train.RANK = 'tests.faults.soak_faults'; "
    "sys.exit(train.run(sys.argv[1:]))"
)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class SoakFailed(AssertionError):
    """The run did not come through, or not as the same run; the message says how, with the command's last lines."""


@dataclass(frozen=True)
class Line:
    when: float  # seconds, monotonic
    text: str


def arguments(name: str, ranks: int, steps: int) -> list[str]:
    batch = 2 * ranks
    return [
        *SMALL,
        *RANKS[ranks],
        f"name={name}",
        f"optim.batch_size.start={batch}",
        f"train.total_tokens={steps * batch * 16}",
        f"checkpoint.every={EVERY}",
        "checkpoint.keep=3",
        "cluster.watchdog.hang_seconds=4",
        "cluster.timeout_seconds=16",
        "cluster.max_restarts=3",
    ]


def session(folder: Path, argv: Sequence[str], faults: Sequence[Fault]) -> tuple[int, list[Line]]:
    """One command from start to the end of its last process; its exit code, and what was said, when."""
    # A launcher that is killed leaves its folder. (Not below ``folder``: the name of a socket is at most 108 bytes.)
    with tempfile.TemporaryDirectory(prefix="soak_") as temporary:
        return _session(folder, argv, faults, temporary)


def _session(
    folder: Path, argv: Sequence[str], faults: Sequence[Fault], temporary: str
) -> tuple[int, list[Line]]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *argv],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "FAULTS": ";".join(fault.word() for fault in faults),
            "TMPDIR": temporary,
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    said: list[Line] = []
    assert process.stdout is not None
    reader = threading.Thread(target=_listen, args=(process.stdout, said), daemon=True)
    reader.start()
    reader.join(PATIENCE)  # orphans hold the pipe open
    if reader.is_alive():
        os.killpg(process.pid, 9)
        raise SoakFailed(f"the command did not end within {PATIENCE:.0f} s:\n{_tail(said)}")
    return process.wait(), said


def _listen(stream: IO[str], said: list[Line]) -> None:
    with stream:
        for text in stream:
            said.append(Line(time.monotonic(), text.rstrip()))


def _tail(said: Sequence[Line]) -> str:
    return "\n".join(line.text for line in said[-60:])


def live(folder: Path, name: str, ranks: int, steps: int, faults: Sequence[Fault]) -> Life:
    """A whole run, its command started again until it is complete."""
    said, starts = list[Line](), list[float]()
    outcome = folder / "runs" / name / "outcome"
    while not (outcome.exists() and outcome.read_text().startswith("complete")):
        if len(starts) > len(faults) + 5:
            raise SoakFailed(f"{len(starts)} commands for {len(faults)} faults:\n{_tail(said)}")
        starts.append(time.monotonic())
        code, heard = session(folder, arguments(name, ranks, steps), faults)
        said += heard
        if code in (ExitCode.FAILED, ExitCode.USER_ERROR, ExitCode.NO_CHECKPOINT, ExitCode.GIVEN_UP):
            raise SoakFailed(f"the command left with {code}:\n{_tail(said)}")
    ended = time.monotonic()
    words = (folder / "steps").read_text().split()
    taken = [(int(step), float(when)) for step, when in zip(words[::2], words[1::2], strict=True)]
    marks = {}
    for number in range(len(faults)):
        mark = folder / f"struck-{number}"
        if not mark.exists():
            raise SoakFailed(f"{faults[number].word()} never struck:\n{_tail(said)}")
        marks[number] = float(mark.read_text())
    restarts = sum(line.text.startswith("starting the ranks again") for line in said)
    lines = [(line.when, line.text) for line in said]
    return Life(folder / "runs" / name, ended, starts, restarts, taken, marks, lines)


def soak(folder: Path, faults: Sequence[Fault], ranks: int) -> Soak:
    """A run with faults and one without, compared. Raises SoakFailed."""
    steps = faults[-1].step + 3 * EVERY
    lives = list[Life]()
    for name, suffered in (("clean", ()), ("soaked", faults)):
        (folder / name).mkdir()
        if lives:  # the same shards
            shutil.copytree(lives[0].folder.parents[1] / "shards", folder / name / "shards")
        else:
            write_text(folder / name)
        lives.append(live(folder / name, name, ranks, steps, suffered))
    clean, soaked = lives
    compare(clean.folder, soaked.folder, steps)
    left = [path.name for path in soaked.folder.parent.iterdir() if path.name.endswith(".lock")]
    if left:
        raise SoakFailed(f"left behind: {left}")
    return measured(clean, soaked, faults, ranks, steps)


def compare(clean: Path, soaked: Path, steps: int) -> None:
    """Raises SoakFailed unless every number of every step, and every tensor of the last checkpoint, is the same."""
    expected, found = numbers(clean), numbers(soaked)
    if len(expected) != steps or expected != found:
        raise SoakFailed(f"the metrics of {soaked} are not those of {clean} ({steps} steps)")
    paths = newest(clean / "checkpoints"), newest(soaked / "checkpoints")
    ours, theirs = (StoredCheckpoint.open(path) for path in paths if path is not None)
    if ours.step != theirs.step or ours.tensors.keys() != theirs.tensors.keys():
        raise SoakFailed(f"{theirs.path} holds other tensors than {ours.path}, or is of another step")
    for name in ours.tensors:
        if not torch.equal(ours.read(name), theirs.read(name)):
            raise SoakFailed(f"{name!r} differs between {ours.path} and {theirs.path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, choices=RANKS, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for soak.json and soak.md")
    args = parser.parse_args()
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        found = soak(Path(folder), plan(args.faults, args.seed, args.ranks, EVERY), args.ranks)
    loads.append(os.getloadavg()[0])
    print(write_report(args.output, found, args.seed, loads))


if __name__ == "__main__":
    main()
