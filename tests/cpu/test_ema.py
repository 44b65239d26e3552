"""The average of weights: its formula bit for bit, what swapping leaves behind, what its thread raises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import CurveConfig, OptimConfig
from deepseek_train.optim.ema import Ema
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.optim.replicated import Replicated
from deepseek_train.phases.wgrad import Weight

NEVER = CurveConfig(0.0)
DECAY = 0.75


def trainer() -> tuple[dict[str, Weight], Replicated]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": Weight(torch.randn(3, 5, generator=generator).bfloat16()),
        "b": Weight(torch.randn(4, generator=generator).bfloat16()),
    }
    config = OptimConfig(NEVER, NEVER, NEVER, NEVER)
    return weights, Replicated([WeightGroup(weights, None, 0.1)], None, config, torch.float32)


def step(weights: dict[str, Weight], optimizer: Replicated, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.main_grad += torch.randn(weight.shape, generator=generator)
    optimizer.reduce()
    assert not optimizer.step(0.1).skipped


def masters(optimizer: Replicated) -> dict[str, Tensor]:
    return {fragment.name: fragment.master.clone() for fragment in optimizer.fragments()}


def test_it_is_a_plain_mean_at_first_and_then_the_moving_average() -> None:
    weights, optimizer = trainer()
    ema = Ema(optimizer.fragments(), DECAY)
    wanted: dict[str, Tensor] = {}
    for number in range(1, 9):
        step(weights, optimizer, number)
        ema.update(number)
        for name, master in masters(optimizer).items():
            share = max(1.0 - DECAY, 1.0 / number)
            wanted[name] = torch.lerp(wanted.get(name, master), master, share)
        if number == 3:
            for average in ema.averages():
                assert torch.allclose(average.tensor, wanted[average.name])
    for average in ema.averages():
        assert torch.equal(average.tensor, wanted[average.name])
        assert not torch.equal(average.tensor, masters(optimizer)[average.name])


def test_the_masters_are_bitwise_themselves_after_the_averages_stood_in_for_them() -> None:
    weights, optimizer = trainer()
    ema = Ema(optimizer.fragments(), DECAY)
    for number in (1, 2, 3):
        step(weights, optimizer, number)
        ema.update(number)
    before, published = masters(optimizer), {name: w.detach().clone() for name, w in weights.items()}
    averages = {average.name: average.tensor.clone() for average in ema.averages()}
    with ema.in_masters():
        optimizer.restore(3)
        for name, weight in weights.items():
            assert torch.equal(masters(optimizer)[name], averages[name])
            assert torch.equal(weight.flatten(), averages[name].bfloat16())
            assert not torch.equal(weight, published[name])
    optimizer.restore(3)
    for name, weight in weights.items():
        assert torch.equal(masters(optimizer)[name], before[name])
        assert torch.equal(weight, published[name])
        assert torch.equal({a.name: a.tensor for a in ema.averages()}[name], averages[name])


def test_without_averages_in_a_checkpoint_it_starts_from_the_masters() -> None:
    weights, optimizer = trainer()
    ema = Ema(optimizer.fragments(), DECAY)
    step(weights, optimizer, 1)
    ema.update(1)
    for fragment in optimizer.fragments():
        fragment.master.fill_(7.0)
    ema.restart()
    assert all(bool((average.tensor == 7.0).all()) for average in ema.averages())


def test_what_its_thread_raises_is_raised_to_whoever_waits() -> None:
    _, optimizer = trainer()
    ema = Ema(optimizer.fragments(), DECAY)
    ema._averages[0] = replace(ema._averages[0], tensor=torch.zeros(2))  # of another size
    ema.update(1)
    with pytest.raises(RuntimeError, match="size"):
        ema.averages()
