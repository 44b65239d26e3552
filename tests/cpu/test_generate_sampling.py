"""Which token is chosen: the likeliest, by its probability, among the likeliest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_train.generate.sampling import Sampling, choose, nucleus

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = PROBABILITIES.log() + 100.0  # a constant changes nothing


def drawn(sampling: Sampling, count: int = 4000) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.bincount(
        torch.tensor([choose(LOGITS, sampling, generator) for _ in range(count)]), minlength=5
    )


def test_temperature_0_takes_the_likeliest_and_asks_no_generator() -> None:
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    assert choose(LOGITS, Sampling(0.0, 0.5), generator) == 1
    assert choose(torch.tensor([0.0, 2.0, 2.0]), Sampling(0.0), generator) == 1
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, 1.0), PROBABILITIES),
        (Sampling(0.5, 1.0), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (Sampling(1.0, 0.69), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        (Sampling(1.0, 0.71), torch.tensor([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85])),
    ],
    ids=["as it is", "temperature", "top_p reached by two", "by three"],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, expected: Tensor) -> None:
    """Within five standard deviations of a count; what is cut off never comes."""
    count = 4000
    counts = drawn(sampling, count)
    assert ((counts - count * expected).abs() <= 5 * (count * expected * (1 - expected)).sqrt()).all()


def test_the_seed_decides() -> None:
    def run(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(LOGITS, Sampling(), generator) for _ in range(40)]

    assert run(1) == run(1) != run(2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(parts: list[int], top_p: float) -> None:
    shares_V = torch.tensor(parts, dtype=torch.float32) / sum(parts)
    kept_V = nucleus(shares_V, top_p)
    kept = kept_V > 0
    assert torch.equal(kept_V[kept], shares_V[kept])
    assert kept.any()
    assert shares_V[kept].min() >= shares_V.where(~kept, 0.0).max()
    rounding = 1e-6  # of a sum of at most thirty shares
    assert shares_V[kept].sum() >= top_p - rounding
    assert shares_V[kept].sum() - shares_V[kept].min() < top_p + rounding


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [
        (Sampling(-0.1), "temperature=-0.1: write 0 for the likeliest token, or more, as 0.6"),
        (Sampling(float("nan")), "temperature=nan: write 0 for the likeliest token, or more, as 0.6"),
        (Sampling(float("inf")), "temperature=inf: write 0 for the likeliest token, or more, as 0.6"),
        (Sampling(1.0, 0.0), "top_p=0.0: write a probability above 0, up to 1 for all tokens"),
        (Sampling(1.0, 1.01), "top_p=1.01: write a probability above 0, up to 1 for all tokens"),
    ],
)
def test_wrong_values_are_told(sampling: Sampling, problem: str) -> None:
    assert sampling.problems() == [problem]


def test_right_values_are_not() -> None:
    assert Sampling(0.0, 1.0).problems() == Sampling(2.5, 0.01).problems() == []
