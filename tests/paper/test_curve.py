"""Values over consumed tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.config.curve import value_at
from deepseek_train.config.schema import CurveConfig, Segment

# V3's learning rate (report section 4.2); warm-up of 2000 steps of some 3072 sequences, as tokens.
V3 = CurveConfig(
    start=0.0,
    segments=(
        Segment(25 * 10**9, 2.2e-4, "linear"),
        Segment(10 * 10**12),
        Segment(14_300 * 10**9, 2.2e-5, "cosine"),
        Segment(14_633 * 10**9),
        Segment(14_800 * 10**9, 7.3e-6, "step"),
    ),
)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (0, 0.0),
        (12_500_000_000, 1.1e-4),
        (25_000_000_000, 2.2e-4),
        (5 * 10**12, 2.2e-4),
        (10 * 10**12, 2.2e-4),
        (12_150 * 10**9, (2.2e-4 + 2.2e-5) / 2),
        (14_300 * 10**9, 2.2e-5),
        (14_633 * 10**9 - 1, 2.2e-5),
        (14_633 * 10**9, 7.3e-6),
        (15 * 10**12, 7.3e-6),
    ],
)
def test_the_learning_rate_of_v3(tokens: int, value: float) -> None:
    assert value_at(V3, tokens) == pytest.approx(value, rel=1e-9)


def test_cosine_is_a_cosine() -> None:
    curve = CurveConfig(4.0, (Segment(100, 2.0, "cosine"),))
    for tokens in (0, 13, 50, 99):
        assert value_at(curve, tokens) == pytest.approx(3.0 + math.cos(math.pi * tokens / 100))


@given(st.floats(0, 1e3), st.integers(0, 10**15))
def test_without_segments_it_is_constant(start: float, tokens: int) -> None:
    assert value_at(CurveConfig(start), tokens) == start


@given(st.integers(0, 20 * 10**12))
def test_every_value_lies_between_the_named_ones(tokens: int) -> None:
    assert 0.0 <= value_at(V3, tokens) <= 2.2e-4


@given(st.integers(25 * 10**9, 15 * 10**12), st.integers(0, 10**12))
def test_after_warm_up_it_never_rises(tokens: int, further: int) -> None:
    assert value_at(V3, tokens + further) <= value_at(V3, tokens)
