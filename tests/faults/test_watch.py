"""One run that loses, freezes and hangs its ranks, one after the other: each is named, the others end in time, and the
run starts again by itself and ends in the bits of one that nothing befell.
"""

import re
import shutil
from pathlib import Path

import pytest

from deepseek_train.config.exit_codes import ExitCode
from tests.faults.commands import SMALL, Done, numbers, run, tensors, until, write_text

FAULTS = (
    "kill forward 1 3",
    "nap rename 0 3",
    "stop optimizer 0 4",
    "hog forward 1 5",
    "sleep save 0 6",
    "kill optimizer 0 7",
    "ask forward 1 8",
)
WATCHED = [
    *SMALL,
    "name=faulty",
    "cluster.watchdog.hang_seconds=3",
    "cluster.timeout_seconds=12",
    "cluster.max_restarts=9",  # five are for the faults: a busy machine may cost more
    "parallel.fallbacks=[{pp: 1, dp: 1, ep: 1, schedule: 1f1b}]",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def faulty(workplace: Path) -> Done:
    """The run up to where it was asked to stop."""
    return run(workplace, *WATCHED, FAULTS=";".join(FAULTS))


def test_killed_ranks_are_named_with_their_step(faulty: Done) -> None:
    assert faulty.code == 0, faulty.err
    for rank, step, phase in ((1, 3, "forward and backward"), (0, 7, "optimizer")):
        lost = f"rank {rank} lost at step {step}, {phase}"
        assert len([line for line in faulty.err.splitlines() if line.startswith(lost)]) == 1, faulty.err
        assert f"[rank {rank}] died of SIGKILL: {lost}" in faulty.err
    assert "Traceback" not in faulty.err


def test_hangs_are_named_by_rank_condition_and_phase(faulty: Done, workplace: Path) -> None:
    assert (workplace / "struck-faulty-nap-rename-3").exists()  # a slow commit is none
    causes = re.findall(
        r"^The cause: rank (\d) \(pid \d+\) is (\w+).* at step (\d), ([^;,.]*)", faulty.err, re.MULTILINE
    )
    # Of a rank that is stuck both may tell: it itself, and its sibling in the same moment.
    assert list(dict.fromkeys(causes)) == [
        ("0", "frozen", "4", "optimizer"),
        ("1", "frozen", "5", "forward and backward"),
        ("0", "stuck", "6", "saving"),
    ]
    assert (
        'injector.py", line' in faulty.err
    )  # where it held Python's lock: it was asked before it was killed
    reports = {path.name: path.read_text() for path in (workplace / "runs" / "faulty" / "hangs").iterdir()}
    names = [(1, 4), (0, 5), (0, 6), (1, 6)]  # frozen ranks write none
    assert set(reports) == {f"rank-{rank:05}-step-{step:08}.txt" for rank, step in names}
    for text in reports.values():
        assert "The cause: rank " in text
        assert 'train/loop.py", line' in text  # the main thread's stack
    assert "in sleep" in reports["rank-00000-step-00000006.txt"]


def test_a_stop_asked_of_one_rank_saves_and_ends_well(faulty: Done, workplace: Path) -> None:
    assert faulty.code == ExitCode.COMPLETE
    assert "stopped after step 8" in faulty.out
    assert (workplace / "runs" / "faulty" / "outcome").read_text() == "stopped after step 8\n"
    assert not (workplace / "runs" / "faulty.lock").exists()


def test_fewer_ranks_go_on_in_a_planned_layout(faulty: Done, workplace: Path) -> None:
    shutil.copytree(workplace / "runs" / "faulty", workplace / "runs" / "fewer")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run(workplace, *WATCHED, "name=fewer", **alone)
    assert done.code == 0, done.err
    assert "1 ranks were started: a layout of parallel.fallbacks is taken" in done.out
    assert "1 ranks: PP 1 (1f1b) x DP 1" in done.out
    assert [step[0] for step in numbers(workplace / "runs" / "fewer")] == list(range(1, 10))


def test_the_run_ends_in_the_bits_of_one_that_nothing_befell(faulty: Done, workplace: Path) -> None:
    done = run(workplace, *WATCHED)
    assert done.code == 0, done.err
    slow = run(workplace, *SMALL, "name=whole", "cluster.watchdog.straggler_every=4", SLOW="1")
    assert slow.code == 0, slow.err
    assert numbers(workplace / "runs" / "faulty") == numbers(workplace / "runs" / "whole")
    assert tensors(workplace / "runs" / "faulty") == tensors(workplace / "runs" / "whole")
    # Being slow it was, and nobody minded but for a word.
    warnings = re.findall(r"^warning: rank (\d) took .* to compute step (\d)", slow.err, re.MULTILINE)
    assert warnings == [("1", "4"), ("1", "8")]


def boards() -> set[Path]:
    """What ranks of this machine tell each other on."""
    return set(Path("/dev/shm").glob("deepseek_train_*"))


def test_torchrun_starts_again_and_a_dead_rank_is_named(workplace: Path) -> None:
    before = boards()
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m")
    done = run(
        workplace,
        "tests.faults",
        *SMALL,
        "name=joined",
        module=torchrun,
        FAULTS="kill optimizer 1 5",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert done.code == 0, done.err
    assert "rank 1 lost at step 5, optimizer" in done.err
    assert [step[0] for step in numbers(workplace / "runs" / "joined")] == list(range(1, 10))
    until(lambda: boards() <= before, 10)  # but for other tests', which go at once


def test_a_rank_with_other_code_is_named_before_anything_is_built(workplace: Path) -> None:
    done = run(workplace, *SMALL, "name=odd", ODD="1")
    assert done.code == ExitCode.USER_ERROR, done.err
    assert "code of deepseek_train: rank 1 has yesterdays, most have " in done.err
    assert not (workplace / "runs" / "odd").exists()
