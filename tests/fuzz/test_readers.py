"""Each reader against a good file with some bytes changed, cut out, doubled or put in. ``python -m tests.fuzz`` does
the same by the million, with coverage as its guide."""

import random

import pytest

from tests.fuzz.targets import TARGETS, seeds

INPUTS = 500


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_reader_refuses_or_returns_what_is_sound(name: str) -> None:
    dice, good = random.Random(name), seeds()[name]
    TARGETS[name](good)
    for _ in range(INPUTS):
        TARGETS[name](mutated(good, dice))


def mutated(good: bytes, dice: random.Random) -> bytes:
    content = bytearray(good)
    for _ in range(dice.choice((1, 1, 2, 5))):
        start = dice.randrange(len(content) + 1)
        end = min(len(content), start + dice.choice((0, 1, 1, 4, 40)))
        new = dice.choice((b"", dice.randbytes(end - start), content[start:end] * 2, dice.choice(TOKENS)))
        content[start:end] = new
    return bytes(content)


TOKENS = [b"-1", b"1e9", b"null", b"true", b"[]", b"{}", b'""', b'"../x"', b"9" * 30, b"\xff" * 8, b"\0" * 8]
