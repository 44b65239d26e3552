"""The bias-only load balance: both rules, and that each evens out a lopsided router."""

from typing import Literal

import pytest
import torch

from deepseek_train.optim.balance import update_bias

Rule = Literal["sign", "magnitude"]
RULES: tuple[Rule, ...] = ("sign", "magnitude")


def test_the_bias_moves_against_the_load_by_the_same_step_for_all() -> None:
    bias_E = torch.tensor([0.5, -0.25, 0.0, 1.0])
    update_bias(bias_E, torch.tensor([30, 10, 20, 20]), 0.125, "sign")  # mean 20
    assert torch.equal(bias_E, torch.tensor([0.375, -0.125, 0.0, 1.0]))


def test_how_far_the_load_is_off_does_not_matter_to_the_sign() -> None:
    a_E, b_E = torch.zeros(4), torch.zeros(4)
    update_bias(a_E, torch.tensor([1001, 999, 1000, 1000]), 0.5, "sign")
    update_bias(b_E, torch.tensor([4000, 0, 1, 3]), 0.5, "sign")  # mean 1001
    assert a_E.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert b_E.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_magnitude_moves_by_how_far_the_load_is_off_in_means() -> None:
    bias_E = torch.tensor([0.5, -0.25, 0.0, 1.0])
    update_bias(bias_E, torch.tensor([30, 10, 20, 20]), 0.125, "magnitude")  # off by half a mean
    assert torch.equal(bias_E, torch.tensor([0.4375, -0.1875, 0.0, 1.0]))


def test_magnitude_does_not_depend_on_the_size_of_the_batch_nor_move_the_sum() -> None:
    load_E = torch.tensor([1, 2, 4, 9])
    a_E, b_E = torch.zeros(4), torch.zeros(4)
    update_bias(a_E, load_E, 0.5, "magnitude")
    update_bias(b_E, 1024 * load_E, 0.5, "magnitude")
    assert a_E.tolist() == b_E.tolist() == [0.375, 0.25, 0.0, -0.625]


def test_the_sum_moves_by_the_surplus_of_idle_experts() -> None:
    load_E = torch.randint(0, 1000, (64,))
    bias_E = torch.zeros(64, dtype=torch.float64)
    update_bias(bias_E, load_E, 2.0**-10, "sign")
    mean = load_E.double().mean()
    assert bias_E.sum() * 2**10 == (load_E < mean).sum() - (load_E > mean).sum()


@pytest.mark.parametrize("rule", RULES)
def test_speed_zero_and_even_loads_leave_it(rule: Rule) -> None:
    bias_E = torch.randn(8)
    before_E = bias_E.clone()
    update_bias(bias_E, torch.randint(1, 9, (8,)), 0.0, rule)
    update_bias(bias_E, torch.full((8,), 7), 0.5, rule)
    assert torch.equal(bias_E, before_E)


@pytest.mark.parametrize(("rule", "speed", "reached"), [("sign", 5e-3, 1.15), ("magnitude", 3e-2, 1.1)])
def test_a_lopsided_router_is_evened_out(rule: Rule, speed: float, reached: float) -> None:
    """Scores in (0, 1) with a taste for some experts; top 4 of 16 by score plus bias, as in training."""
    generator = torch.Generator().manual_seed(0)
    taste_E = torch.linspace(-1.5, 1.5, 16)
    bias_E = torch.zeros(16)

    def load() -> torch.Tensor:
        scores_NE = (taste_E + torch.randn(2048, 16, generator=generator)).sigmoid()
        return torch.bincount((scores_NE + bias_E).topk(4, -1).indices.flatten(), minlength=16)

    def worst(load_E: torch.Tensor) -> float:
        return float(load_E.max() / load_E.double().mean())

    before = worst(load())
    for _ in range(150):
        update_bias(bias_E, load(), speed, rule)
    assert before > 2.0
    assert worst(load()) < reached
    assert bias_E[0] > 0 > bias_E[-1]
