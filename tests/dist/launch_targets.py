"""What the tests of ``cli.launch_local`` run as ranks. ``python -m tests.dist.launch_targets FUNCTION WORLD [ARG...]``
is a tiny console command around ``launch``."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from deepseek_train.cli.launch_local import launch

PRELOAD = ["json.tool", *os.environ.get("ALSO_PRELOAD", "").split()]
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "DEEPSEEK_TRAIN_STORE",
)


def show_environment(argv: list[str]) -> None:
    folder = Path(argv[0])
    rank = os.environ["RANK"]
    lines = [f"{name}={os.environ[name]}" for name in VARIABLES]
    lines += [f"cwd={os.getcwd()}", f"json={'json.tool' in sys.modules}"]
    (folder / rank).write_text("\n".join(lines))


def all_reduce(argv: list[str]) -> int:
    import torch  # noqa: PLC0415 - the other targets start in no time without it
    import torch.distributed as dist  # noqa: PLC0415

    from deepseek_train.parallel.rendezvous import join  # noqa: PLC0415

    place = join("cpu")
    x = torch.tensor(float(place.rank + 1))
    dist.all_reduce(x)
    dist.barrier()
    dist.destroy_process_group()
    return int(x.item())


def rank_one_raises(argv: list[str]) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("the cause")
    time.sleep(0.3)
    raise RuntimeError("Connection reset by peer")


def rank_one_leaves_a_message(argv: list[str]) -> None:
    if os.environ["RANK"] == "1":
        raise SystemExit("optim.lr is negative")
    time.sleep(600)


def rank_one_crashes(argv: list[str]) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


def rank_zero_returns_seven(argv: list[str]) -> int:
    return 7 if os.environ["RANK"] == "0" else 0


def deaf_but_for_rank_one(argv: list[str]) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("the cause")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def fails_twice(argv: list[str]) -> int:
    """Rank 1, in its first two lives."""
    folder, code = Path(argv[0]), int(argv[1])
    lives = folder / f"{os.environ['RANK']}-{len(list(folder.glob(os.environ['RANK'] + '-*')))}"
    lives.write_text(" ".join(argv))
    return code if os.environ["RANK"] == "1" and not lives.name.endswith("-2") else 0


def follows_a_peer(argv: list[str]) -> int:
    """Rank 0 is told that a peer is lost, before anybody hears of rank 1's own end."""
    if os.environ["RANK"] == "0":
        return 4
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def say(line: str) -> None:
    """Print in one piece: the ranks share one pipe."""
    os.write(1, f"{line}\n".encode())


def steps_until_told(argv: list[str]) -> int:
    """A training loop: finishes its step at SIGTERM, would die of a KeyboardInterrupt."""
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)

    signal.signal(signal.SIGTERM, ask)
    say(f"ready pid={os.getpid()}")
    while not asked:
        time.sleep(0.05)
    time.sleep(0.2)
    say(f"finished {os.environ['RANK']}")
    if argv == ["deaf"]:
        time.sleep(600)
    return 0


def main() -> int:
    name, world_size, *argv = sys.argv[1:]
    return launch(
        f"tests.dist.launch_targets:{name}",
        argv,
        int(world_size),
        preload=PRELOAD,
        grace_seconds=1,
        max_restarts=int(os.environ.get("RESTARTS", "0")),
        again=[*argv, "again"],
    )


if __name__ == "__main__":
    sys.exit(main())
