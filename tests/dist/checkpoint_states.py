"""States of random bits to save and load: logical tensors (NaNs, infinities, negative zeros among them), cut
into more pieces than there are ranks, which are dealt out: no rank's pieces are next to each other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.store import load, save

LENGTHS = {"master/layers.3.experts.gate_up": 301, "moment/embed": 64, "seen": 17, "tiny": 1}
DTYPES = {
    "master/layers.3.experts.gate_up": torch.float32,
    "moment/embed": torch.bfloat16,
    "seen": torch.int64,
}
BIAS = "bias/layers.3"
FACTS: dict[str, Any] = {"step": 7, "cursor": {"document": [3, 1]}, "wandb": None, "lr": 0.1}


def bits(name: str, length: int, seed: int) -> Tensor:
    """A logical tensor of random bits."""
    dtype = DTYPES.get(name, torch.float32)
    generator = torch.Generator().manual_seed(seed + len(name))
    return torch.randint(0, 256, (length * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(
        dtype
    )


def snapshot(rank: int, ranks: int, seed: int | None) -> Snapshot:
    """What ``rank`` holds of the state ``seed``; None: zeros to load into. The last rank has no bias."""
    pieces = []
    for name, length in LENGTHS.items():
        whole = torch.zeros(length, dtype=DTYPES.get(name)) if seed is None else bits(name, length, seed)
        cuts = [length * i // (2 * ranks + 1) for i in range(2 * ranks + 2)]
        for i in range(rank, 2 * ranks + 1, ranks):
            pieces.append(Piece(name, cuts[i], length, whole[cuts[i] : cuts[i + 1]]))
    bias = torch.zeros(2, 4) if seed is None else bits(BIAS, 8, seed).view(2, 4)
    return Snapshot(
        pieces, {BIAS: bias} if rank < ranks - 1 or ranks == 1 else {}, FACTS if seed is not None else {}
    )


def assert_holds(found: Snapshot, rank: int, ranks: int, seed: int) -> None:
    expected = snapshot(rank, ranks, seed)
    for ours, theirs in zip(found.pieces, expected.pieces, strict=True):
        assert torch.equal(ours.tensor.view(torch.uint8), theirs.tensor.view(torch.uint8)), ours.name
    for name, tensor in found.replicated.items():
        assert torch.equal(tensor.view(torch.uint8), expected.replicated[name].view(torch.uint8)), name


def assert_untouched(found: Snapshot) -> None:
    for tensor in [*(piece.tensor for piece in found.pieces), *found.replicated.values()]:
        assert not tensor.any()


def save_state(rank: int, ranks: int, root: Path, step: int = 7, seed: int = 1, keep: int = 9) -> Path:
    return save(root, step, snapshot(rank, ranks, seed), keep=keep)


def load_state(rank: int, ranks: int, path: Path) -> dict[str, Any]:
    found = snapshot(rank, ranks, None)
    facts = load(path, found)
    assert_holds(found, rank, ranks, 1)
    return facts


def message(work: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    return str(caught.value)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def ones(name: str, start: int, end: int, total: int, dtype: torch.dtype = torch.float32) -> Snapshot:
    return Snapshot([Piece(name, start, total, torch.ones(end - start, dtype=dtype))])
