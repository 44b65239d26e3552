"""The checksum of replicas: every flipped bit and every exchange changes it; chunks do not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.parallel import checksum as room
from deepseek_train.parallel.checksum import checksum

TYPES = [torch.bfloat16, torch.float32]


def bits(dtype: torch.dtype, length: int, seed: int) -> torch.Tensor:
    """Random bits, NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (length * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


def by_hand(tensor: torch.Tensor) -> int:
    values = tensor.view(room.INTEGERS[tensor.element_size()]).tolist()
    total = sum(value * (2 * i + 1) for i, value in enumerate(values)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@given(st.sampled_from(TYPES), st.integers(1, 40), st.integers(0, 1 << 30), st.data())
def test_any_flipped_bit_and_any_exchange_changes_it(
    dtype: torch.dtype, length: int, seed: int, data: st.DataObject
) -> None:
    tensor = bits(dtype, length, seed)
    found = int(checksum(tensor))
    assert found == by_hand(tensor)
    one, other = (data.draw(st.integers(0, length - 1)) for _ in range(2))
    raw = tensor.clone().view(torch.uint8)
    raw[one * dtype.itemsize + data.draw(st.integers(0, dtype.itemsize - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    assert int(checksum(raw.view(dtype))) != found
    swapped = tensor.clone().view(length, 1).view(torch.uint8)
    swapped[[one, other]] = swapped[[other, one]]
    same = bool((swapped[one] == swapped[other]).all())
    assert (int(checksum(swapped.view(dtype).view(-1))) == found) == same


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = bits(torch.float32, 100, 3)
    monkeypatch.setattr(room, "CHUNK", chunk)
    assert int(checksum(tensor)) == by_hand(tensor)


def test_a_tensor_of_any_shape_is_read_in_its_own_order() -> None:
    tensor = bits(torch.bfloat16, 24, 5).view(4, 6)
    assert int(checksum(tensor)) == by_hand(tensor.flatten())
    assert int(checksum(tensor.T)) == by_hand(tensor.T.flatten())
    assert int(checksum(tensor[:0])) == 0
