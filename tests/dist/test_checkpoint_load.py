"""Loading checkpoints: bitwise, free of any layout, and refused where they are damaged or do not fit."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepseek_train.checkpoint.folders import newest
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.store import load, save
from tests.dist.checkpoint_states import (
    FACTS,
    LENGTHS,
    assert_holds,
    assert_untouched,
    bits,
    load_state,
    message,
    ones,
    save_state,
    snapshot,
)
from tests.harness import run_ranks


def load_and_save_again(rank: int, ranks: int, path: Path, root: Path) -> Path:
    found = snapshot(rank, ranks, None)
    facts = load(path, found)
    assert_holds(found, rank, ranks, 1)
    return save(root, 8, Snapshot(found.pieces, found.replicated, facts), keep=1)


def load_failure(rank: int, ranks: int, path: Path) -> str:
    found = snapshot(rank, ranks, None)
    text = message(lambda: load(path, found))
    assert_untouched(found)
    return text


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    first, second = run_ranks(save_state, 2, tmp_path)
    assert first == second == newest(tmp_path)
    assert run_ranks(load_state, 2, first) == [FACTS, FACTS]


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    assert load_state(0, 1, save_state(0, 1, tmp_path)) == FACTS


def test_any_other_number_of_ranks_can_load(tmp_path: Path) -> None:
    path = run_ranks(save_state, 2, tmp_path)[0]
    path = load_and_save_again(0, 1, path, tmp_path)
    path = run_ranks(load_and_save_again, 3, path, tmp_path)[0]
    assert run_ranks(load_state, 2, path) == [FACTS, FACTS]


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    path = run_ranks(save_state, 2, tmp_path)[0]
    found: dict[str, Tensor] = {}
    for rank in range(2):
        found |= load_file(path / f"rank-{rank:05}.safetensors")
    for name, length in LENGTHS.items():
        whole = bits(name, length, 1)
        pieces = {key: t for key, t in found.items() if key.startswith(f"{name}@")}
        assert sum(map(len, pieces.values())) == length
        for key, piece in pieces.items():
            start = int(key.removeprefix(f"{name}@"))
            expected = whole[start : start + len(piece)]
            assert torch.equal(piece.view(torch.uint8), expected.view(torch.uint8))


# What is wrong on disk


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    path = run_ranks(save_state, 2, tmp_path)[0]
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert listed.keys() | {"manifest.json"} == {file.name for file in path.iterdir()}
    assert len(listed) == 3


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = save_state(0, 1, tmp_path)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for at in (0, len(good) // 2, len(good) - 2):
            file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            assert file.name in load_failure(0, 1, path), at
        file.write_bytes(good)
    assert load_state(0, 1, path) == FACTS


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "tensors.json"])
def test_all_ranks_hear_of_damage_that_one_found(tmp_path: Path, name: str) -> None:
    file = run_ranks(save_state, 2, tmp_path)[0] / name
    good = file.read_bytes()
    file.write_bytes(good[:99] + bytes([good[99] ^ 1]) + good[100:])
    first, second = run_ranks(load_failure, 2, file.parent)
    assert first == second
    expected = json.loads((file.parent / "manifest.json").read_text())["files"][name]["xxh3_128"]
    assert str(file) in first
    assert expected in first


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    file = save_state(0, 1, tmp_path) / "rank-00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    text = load_failure(0, 1, file.parent)
    assert f"{file} has {size - 1} bytes, the manifest expects {size}" in text
    file.unlink()
    assert f"{file} is missing" in load_failure(0, 1, file.parent)


def test_without_a_valid_manifest_it_does_not_exist(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    older, old = save_state(0, 1, tmp_path, 4), save_state(0, 1, tmp_path, 12)
    torn = save_state(0, 1, tmp_path, 100)
    assert newest(tmp_path) == torn
    (torn / "manifest.json").unlink()
    assert newest(tmp_path) == old
    assert "manifest.json" in load_failure(0, 1, torn)
    text = (old / "manifest.json").read_text()
    (old / "manifest.json").write_text(text.replace('"lr": 0.1', '"lr": 0.2'))
    assert newest(tmp_path) == older
    assert "damaged or was edited" in load_failure(0, 1, old)


# Checkpoints that do not fit

MISFITS: dict[str, tuple[Snapshot, str]] = {
    "missing": (ones("x", 0, 2, 2), "'x' is not in the checkpoint"),
    "total": (ones("w", 0, 2, 5), "'w' has 6 elements in the checkpoint, 5 are expected"),
    "dtype": (ones("w", 0, 2, 6, torch.bfloat16), "'w' is torch.float32 in the checkpoint, torch.bfloat16"),
    "double": (Snapshot(ones("w", 0, 2, 6).pieces * 2), "two pieces of 'w' that start at 0"),
    "forgotten": (ones("w", 0, 2, 6), "'v' is in the checkpoint, but no rank asks for it"),
}


def misfits(rank: int, ranks: int, path: Path) -> dict[str, str]:
    """Rank 0 asks for what is there, rank 1 for what is not."""
    texts = {}
    for name, (asked, _) in MISFITS.items():
        mine = ones("w", 0, 6, 6) if rank == 0 else asked
        texts[name] = message(lambda mine=mine: load(path, mine))  # type: ignore[misc]
        assert torch.equal(
            mine.pieces[0].tensor, torch.ones_like(mine.pieces[0].tensor)
        )  # nothing was touched
    return texts


def test_what_does_not_fit_is_named_on_every_rank(tmp_path: Path) -> None:
    stored = Snapshot([Piece("w", 0, 6, torch.arange(6.0)), Piece("v", 0, 1, torch.zeros(1))])
    path = save(tmp_path, 3, stored, keep=1)
    first, second = run_ranks(misfits, 2, path)
    assert first == second
    for name, (_, expected) in MISFITS.items():
        assert expected in first[name], name
