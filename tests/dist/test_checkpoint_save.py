"""Saving checkpoints: all or nothing, which are kept, and what ranks may not disagree about."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_train.checkpoint import folders
from deepseek_train.checkpoint.folders import newest
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.store import save
from tests.dist.checkpoint_states import load_state, message, names, ones, save_state
from tests.harness import RanksFailed, run_ranks

# Which checkpoints are kept


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        save_state(0, 1, tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    # a run that was sent back to an earlier step must not lose what it just saved
    save_state(0, 1, tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000011"]
    with pytest.raises(ValueError, match="keep is 0"):
        save_state(0, 1, tmp_path, 12, keep=0)


def test_same_step_again_takes_its_place(tmp_path: Path) -> None:
    save_state(0, 1, tmp_path, seed=2)
    path = save_state(0, 1, tmp_path, seed=1)
    assert names(tmp_path) == [path.name]
    load_state(0, 1, path)


# Saves that do not end well


def save_and_die(rank: int, ranks: int, root: Path, step: int, where: str, calls: int) -> None:
    def die_at_last(original: Callable[..., Any]) -> Callable[..., Any]:
        left = iter(range(calls))
        return lambda *args: (
            original(*args) if next(left) < calls - 1 else os.kill(os.getpid(), signal.SIGKILL)
        )

    with pytest.MonkeyPatch.context() as patch:
        home = folders if where == "write_manifest" else Path
        patch.setattr(home, where, die_at_last(getattr(home, where)))
        save_state(rank, ranks, root, step, seed=2)


@pytest.mark.parametrize("where", ["write_manifest", "rename"])
def test_killed_save_leaves_the_old_checkpoint(tmp_path: Path, where: str) -> None:
    old = save_state(0, 1, tmp_path)
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(save_and_die, 1, tmp_path, 8, where, 1)
    assert len(names(tmp_path)) == 2
    assert newest(tmp_path) == old
    load_state(0, 1, old)
    path = save_state(0, 1, tmp_path, 8)
    assert names(tmp_path) == [old.name, path.name]


def test_killed_while_replacing_leaves_the_replaced(tmp_path: Path) -> None:
    save_state(0, 1, tmp_path)
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(save_and_die, 1, tmp_path, 7, "rename", 2)
    left = newest(tmp_path)
    assert left == tmp_path / "step-00000007.replaced"
    load_state(0, 1, left)
    path = save_state(0, 1, tmp_path)
    assert names(tmp_path) == [path.name]


def save_on_a_small_disk(rank: int, ranks: int, root: Path) -> str:
    """Rank 1 cannot write files of more than 500 bytes: the write itself fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    text = message(lambda: save_state(rank, ranks, root, 8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return text


def test_full_disk_on_one_rank_fails_everywhere_and_costs_nothing(tmp_path: Path) -> None:
    old = run_ranks(save_state, 2, tmp_path)[0]
    first, second = run_ranks(save_on_a_small_disk, 2, tmp_path)
    assert first == second
    assert "[rank 1]" in first
    assert names(tmp_path) == [old.name]
    run_ranks(load_state, 2, old)


def save_failure(rank: int, ranks: int, root: Path) -> str:
    return message(lambda: save_state(rank, ranks, root))


def test_unwritable_root_fails_everywhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_ranks(save_failure, 2, tmp_path / "file" / "checkpoints")
    assert first == second
    assert str(tmp_path / "file") in first


# Ranks that disagree

Change = Callable[[int], Snapshot]


CONFLICTS: dict[str, tuple[Change, str]] = {
    "gap": (lambda r: ones("w", 4 * r, 4 * r + 3, 7), "'w': no rank holds elements [3, 4) of 7"),
    "short": (lambda r: ones("w", 3 * r, 3 * r + 3, 7), "'w': no rank holds elements [6, 7) of 7"),
    "overlap": (lambda r: ones("w", 3 * r, 3 * r + 4, 7), "'w': ranks 0 and 1 both hold elements [3, 4)"),
    "twice": (lambda r: ones("w", 0, 4, 4), "'w': ranks 0 and 1 both hold elements [0, 4)"),
    "total": (
        lambda r: ones("w", 3 * r, 3 * r + 3, 6 + r),
        "'w' has 6 elements of torch.float32 for rank 0, but 7",
    ),
    "dtype": (
        lambda r: ones("w", 3 * r, 3 * r + 3, 6, (torch.float32, torch.bfloat16)[r]),
        "but 6 of torch.bfloat16 for rank 1",
    ),
    "replica": (
        lambda r: Snapshot([], {"bias": torch.full((2,), float(r))}),
        "'bias' must be the same on all ranks",
    ),
    "facts": (lambda r: Snapshot([], {}, {"tokens": 5 + r}), "fact 'tokens' must be the same on all ranks"),
    "tuple": (lambda r: Snapshot([], {}, {"cursor": (1, 2)}), "fact 'cursor' would not come back from JSON"),
    "object": (lambda r: Snapshot([], {}, {"when": torch.ones(1)}), "fact 'when' is no JSON"),
    "name": (lambda r: Snapshot(ones("w", 0, 2, 2).pieces, {"w": torch.ones(2)}), "'w' is both"),
}


def conflicts(rank: int, ranks: int, root: Path) -> dict[str, str]:
    return {
        name: message(lambda make=make: save(root, 3, make(rank), keep=1))  # type: ignore[misc]
        for name, (make, _) in CONFLICTS.items()
    }


def test_disagreements_are_named_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(conflicts, 2, tmp_path)
    assert first == second
    for name, (_, expected) in CONFLICTS.items():
        assert expected in first[name], name
    assert names(tmp_path) == []


def test_pieces_outside_of_their_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 6\) are outside of the logical tensor's 5"):
        ones("w", 3, 6, 5)
    with pytest.raises(ValueError, match="flat and contiguous"):
        Piece("w", 0, 4, torch.ones(2, 2))
