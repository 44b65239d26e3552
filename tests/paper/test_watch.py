"""The board, what is read off it, and whom it blames; no torch, no ranks but processes that sleep."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.watch.board import Board
from deepseek_train.watch.judge import Condition, Judged, Patience, causes, judged, verdict
from deepseek_train.watch.whereabouts import SLOT_BYTES, Sight, State, Whereabouts

SECOND = 1_000_000_000
NOW = 1000 * SECOND
PATIENCE = Patience(tick=2.0, progress=5.0)
MOVING = Sight(3, 4711, State.HERE, 12, "training", "0B2", "a gradient", False, False, NOW, NOW, 0)

SLEEPER = """
import sys, time
from pathlib import Path
from deepseek_train.watch.board import Board
where = Board(Path(sys.argv[1]), 3).take(1)
where.phase("optimizer", 7)
where.waits("all-gather of weights")
print("here", flush=True)
time.sleep(600)
"""


@given(st.text(max_size=400), st.text(max_size=400), st.text(max_size=400), st.integers(0, 2**60))
def test_what_is_written_is_read(phase: str, doing: str, transfer: str, step: int) -> None:
    slot = bytearray(SLOT_BYTES + 2)
    where = Whereabouts(memoryview(slot)[1:-1])
    where.enter(4711)
    where.phase(phase, step)
    where.at(doing)
    where.waits(transfer)
    seen = where.seen(3)
    assert (seen.rank, seen.pid, seen.state, seen.step, seen.waiting) == (3, 4711, State.HERE, step, True)
    for text, read, size in (
        (phase, seen.phase, 64),
        (doing, seen.doing, 128),
        (transfer, seen.transfer, 256),
    ):
        assert read.rstrip("\ufffd") == text.encode()[:size].decode(errors="ignore").rstrip("\0\ufffd")
    assert (slot[0], slot[-1]) == (0, 0)  # nothing beside the slot


def test_a_phase_may_be_long_the_first_time_or_when_it_says_so() -> None:
    where = Whereabouts.unseen()
    found = []
    for name, long in (("step", False), ("step", False), ("saving", True), ("saving", True), ("step", False)):
        where.phase(name, long=long)
        found.append(where.seen(0).long)
    assert found == [True, False, True, True, False]


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Rank 1 of three, in a process of its own."""
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / "board")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def test_a_rank_is_lost_the_moment_it_dies_and_not_before(
    tmp_path: Path, sleeper: "subprocess.Popen[str]"
) -> None:
    board = Board(tmp_path / "board", 3)
    board.take(0)
    assert [sight.rank for sight in board.sights()] == [0, 1]  # nobody has come as rank 2
    assert board.lost() == []
    sleeper.send_signal(signal.SIGSTOP)
    assert board.lost() == []
    sleeper.kill()
    deadline = time.monotonic() + 5
    while not board.lost() and time.monotonic() < deadline:
        time.sleep(0.01)
    (lost,) = board.lost()  # though it is a zombie: nobody has waited for it
    assert (lost.rank, lost.pid) == (1, sleeper.pid)
    assert lost.place == "step 7, optimizer; in transfer: all-gather of weights"


def test_a_slot_has_one_owner(tmp_path: Path, sleeper: "subprocess.Popen[str]") -> None:
    board = Board(tmp_path / "board", 3)
    with pytest.raises(BlockingIOError):
        board.take(1)


def test_who_leaves_in_good_order_is_not_lost(tmp_path: Path) -> None:
    code = SLEEPER.replace("time.sleep(600)", "where.leave()")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "board")], check=True, capture_output=True)
    board = Board(tmp_path / "board", 3)
    assert [sight.state for sight in board.sights()] == [State.LEFT]
    assert board.lost() == []


LATE = NOW - 60 * SECOND
CASES = [
    (MOVING, True, Condition.MOVING),
    (replace(MOVING, state=State.LEFT, tick_ns=LATE, progress_ns=LATE), False, Condition.LEFT),
    (MOVING, False, Condition.LOST),
    (replace(MOVING, tick_ns=LATE), True, Condition.FROZEN),
    (replace(MOVING, progress_ns=LATE), True, Condition.STUCK),
    (replace(MOVING, progress_ns=LATE, waiting=True), True, Condition.WAITING),
    (replace(MOVING, progress_ns=NOW + SECOND), True, Condition.MOVING),  # written while we looked
]


@pytest.mark.parametrize(("sight", "alive", "condition"), CASES, ids=[str(case[2].name) for case in CASES])
def test_the_condition_of_a_rank(sight: Sight, alive: bool, condition: Condition) -> None:
    assert judged(sight, alive, NOW, PATIENCE).condition is condition


def of(*conditions: Condition) -> list[Judged]:
    return [Judged(replace(MOVING, rank=rank), c, 9.0) for rank, c in enumerate(conditions)]


@given(st.lists(st.sampled_from(Condition), max_size=8))
def test_blame_falls_on_the_dead_then_the_frozen_then_the_stuck(conditions: list[Condition]) -> None:
    blamed = {one.sight.rank for one in causes(of(*conditions))}
    for worst in (Condition.LOST, Condition.FROZEN, Condition.STUCK):
        if worst in conditions:
            assert blamed == {rank for rank, c in enumerate(conditions) if c is worst}
            return
    assert blamed == set()


def test_the_verdict_says_where_to_look() -> None:
    waiting = of(Condition.WAITING, Condition.WAITING)
    assert "on another machine" in verdict(waiting, world_size=4)
    assert "disagree about the order of transfers" in verdict(waiting, world_size=2)
    assert verdict(of(Condition.WAITING, Condition.FROZEN), 2).startswith(
        "The cause: rank 1 (pid 4711) is frozen"
    )


def test_writing_is_cheap() -> None:
    where, best = Whereabouts.unseen(), 1.0
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            where.at("0B2 moe.attend")
            where.waits("the gradient of micro-batch 2 for stage 0 from rank 1")
            where.goes_on()
        best = min(best, (time.perf_counter() - began) / 600)
    assert best < 10e-6  # it takes 0.5 us: a step has some hundreds
