"""Runs that suffer several faults in turn and end in the bits of one that nothing befell."""

import re
from pathlib import Path

import pytest

from deepseek_train.config.exit_codes import ExitCode
from deepseek_train.monitor.events import read_events
from tests.faults.commands import SMALL, Done, numbers, run, tensors

PERSISTENT = [*SMALL, "cluster.max_restarts=9"]


def test_a_rank_without_memory_says_so_and_goes_on(whole: Path, workplace: Path) -> None:
    done = run(workplace, *PERSISTENT, "name=memory", FAULTS="memory forward 1 5")
    assert done.code == 0, done.err
    said = "rank 1 is out of memory at step 5, forward and backward"
    assert len([line for line in done.err.splitlines() if line.startswith(said)]) == 1
    assert "can't allocate memory" in done.err
    assert re.search(
        r"at most \S+ MiB resident so far; micro-batches of 1 x 16 tokens, recomputed: ", done.err
    )
    assert "more in train.recompute" in done.err
    assert f"[rank 1] left with exit code {ExitCode.OUT_OF_MEMORY}" in done.err
    assert "starting the ranks again (1 of " in done.err
    assert "Traceback" not in done.err
    assert numbers(whole.with_name("memory")) == numbers(whole)
    assert tensors(whole.with_name("memory")) == tensors(whole)


SAVES = (
    "kill files 1 2",  # nothing of rank 1 is written
    "kill index 0 4",
    "kill manifest 0 6",  # all files, no manifest
    "kill rename 0 7",  # a manifest, in a draft
    "kill renamed 0 8",  # a checkpoint that nobody was told of
    "kill retire 0 9",
)


@pytest.mark.slow_faults
def test_killed_saves_cost_nothing_that_was_saved_before(whole: Path, workplace: Path) -> None:
    done = run(workplace, *PERSISTENT, "name=saves", "checkpoint.every=1", FAULTS=";".join(SAVES))
    assert done.code == 0, done.err
    assert done.err.count("died of SIGKILL") == len(SAVES)
    assert done.err.count("starting the ranks again") == len(SAVES)
    folder = whole.with_name("saves")
    assert not [path.name for path in (folder / "checkpoints").iterdir() if path.name.endswith(".bad")]
    assert not [path.name for path in (folder / "checkpoints").iterdir() if ".tmp-" in path.name], done.err
    assert numbers(folder) == numbers(whole)
    assert tensors(folder) == tensors(whole)


@pytest.mark.slow_faults
def test_a_flipped_bit_sends_the_run_back(whole: Path, workplace: Path) -> None:
    """The stage's mirror on the other rank has the right one."""
    watched = [*PERSISTENT, "name=flipped", "train.check_replicas_every=1"]
    done = run(workplace, *watched, FAULTS="flip forward 1 5")
    assert done.code == 0, done.err
    assert "step 5: ranks that must hold the same bits do not." in done.err
    assert re.search(r"^  \S+: rank 0 against rank 1 \(no majority", done.err, re.MULTILINE)
    assert f"left with exit code {ExitCode.REPLICAS_DIFFER}" in done.err
    assert "Traceback" not in done.err
    assert [event.what for event in read_events(whole.with_name("flipped"))] == ["replicas differ"]
    assert numbers(whole.with_name("flipped")) == numbers(whole)
    assert tensors(whole.with_name("flipped")) == tensors(whole)


@pytest.fixture(scope="module")
def poisoned(whole: Path, workplace: Path) -> tuple[Path, Done]:
    """One NaN on rank 1 in step 3."""
    assert whole.exists()
    return whole.with_name("poisoned"), run(workplace, *SMALL, "name=poisoned", FAULTS="nan optimizer 1 3")


@pytest.mark.slow_faults
def test_a_nan_is_skipped_by_all_ranks_and_killed_ranks_skip_it_again(
    poisoned: tuple[Path, Done], whole: Path, workplace: Path
) -> None:
    folder, done = poisoned
    assert done.code == 0, done.err
    assert "STEP 3 SKIPPED: a gradient is not finite" in done.out
    assert [(event.step, event.what) for event in read_events(folder)] == [(3, "skipped")]
    assert numbers(folder)[:2] == numbers(whole)[:2]
    assert tensors(folder) != tensors(whole)
    again = run(workplace, *PERSISTENT, "name=again", FAULTS="nan optimizer 1 3; kill optimizer 0 4")
    assert again.code == 0, again.err
    assert "rank 0 lost at step 4, optimizer" in again.err
    assert len(read_events(whole.with_name("again"))) == 2  # it was skipped twice
    assert numbers(whole.with_name("again")) == numbers(folder)
    assert tensors(whole.with_name("again")) == tensors(folder)


@pytest.mark.slow_faults
def test_nothing_but_nan_stops_the_run(poisoned: tuple[Path, Done], workplace: Path) -> None:
    faults = ";".join(f"nan optimizer 1 {step}" for step in range(4, 10))
    strict = ["train.guard.max_skips=2", "train.guard.max_rollbacks=1"]
    done = run(workplace, *PERSISTENT, "name=hopeless", *strict, FAULTS=faults)
    assert done.code == ExitCode.GIVEN_UP
    assert "the guard stops the run at step " in done.err
    assert "sequences [" in done.err
    assert "starting the ranks again" not in done.err
    assert "Traceback" not in done.err
