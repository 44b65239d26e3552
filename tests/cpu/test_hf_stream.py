"""Safetensors files written tensor by tensor, read by the library."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from deepseek_train.checkpoint.safetensors_stream import Header, write_stream

TYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def tensor(number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6
    ),
    st.randoms(use_true_random=False),
)
def test_the_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]], random: st.DrawFn
) -> None:
    tensors = {f"t{i}": tensor(i, dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds)}
    headers = [Header(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    given = list(tensors.items())
    random.shuffle(given)  # type: ignore[attr-defined]
    path = tmp_path_factory.mktemp("stream") / "a.safetensors"
    write_stream(path, headers, given)
    with safe_open(path, framework="pt") as found:
        assert found.metadata() == {"format": "pt"}
        assert set(found.keys()) == set(tensors)
        for name, expected in tensors.items():
            assert found.get_tensor(name).dtype == expected.dtype
            assert found.get_tensor(name).shape == expected.shape
            assert torch.equal(
                found.get_tensor(name).view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)
            )


def test_tensors_are_aligned(tmp_path: Path) -> None:
    """One byte of FP8 before FP32 would put every later tensor at an odd address."""
    headers = [Header("a", torch.float8_e4m3fn, (3,)), Header("b", torch.float32, (5,))]
    path = tmp_path / "a.safetensors"
    write_stream(path, headers, [(h.name, tensor(0, h.dtype, h.shape)) for h in headers])
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    ours = {h.name: tensor(0, h.dtype, h.shape) for h in headers}
    assert path.read_bytes()[8 + length :] == save(ours)[-23:]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "not written: a"),
        ([("a", torch.zeros(3))], "announced as"),
        ([("a", torch.zeros(2, dtype=torch.bfloat16))], "announced as"),
    ],
)
def test_what_was_not_announced(tmp_path: Path, given: list[tuple[str, Tensor]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        write_stream(tmp_path / "a.safetensors", [Header("a", torch.float32, (2,))], given)
