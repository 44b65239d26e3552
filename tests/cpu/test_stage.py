"""Modules against the table of weights, for every number of stages."""

import pytest
import torch

from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.parallel.exchange import ExpertGroup
from deepseek_train.phases.phase import fold
from deepseek_train.phases.wgrad import Weight, WeightGradQueue
from deepseek_train.spec.stages import split_layers, stage_weights
from tests.helpers.models import random_batch, tiny, whole_model

MODELS = {
    "v3": tiny(num_layers=5),
    "no mtp, direct queries": tiny(num_layers=5, mtp_depth=0, q_lora_rank=None),
    "deep mtp, no shared experts": tiny(num_layers=5, mtp_depth=3, num_shared_experts=0),
    "all dense": tiny(num_layers=5, num_dense_layers=5),
}


def on_rank(rank: int, size: int) -> ExpertGroup:
    """Enough of a group to build and fill weights: nothing is exchanged."""
    return ExpertGroup(group=None, rank=rank, size=size)


@pytest.mark.parametrize("num_stages", range(1, 6))
@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_modules_hold_exactly_the_weights_of_the_table(m, num_stages: int) -> None:  # type: ignore[no-untyped-def]
    for spec in split_layers(m, num_stages):
        stage = Stage(ModelContext(m, WeightGradQueue()), spec, length=8)
        table = stage_weights(m, spec)
        assert {n: tuple(w.shape) for n, w in stage.weights().items()} == {
            w.name: w.shape for w in table if w.trained
        }
        buffers = {f"{n}.router.bias" for n in (_router_owner(m, i) for i, _ in stage.routers())}
        assert buffers == {w.name for w in table if not w.trained}
        assert {b.shape for b in stage.buffers()} <= {(m.num_routed_experts,)}


def _router_owner(m, index: int) -> str:  # type: ignore[no-untyped-def]
    return f"layers.{index}" if index < m.num_layers else f"mtp.{index - m.num_layers}.block"


def test_every_parameter_is_a_weight_of_the_queue() -> None:
    """``weights`` leaves out anything that is not: such a parameter would never be trained."""
    stage = whole_model(tiny(), length=8)
    assert all(isinstance(p, Weight) for p in stage.parameters())
    assert len(stage.weights()) == len(list(stage.parameters()))


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_stages_in_a_row_compute_the_whole_model(num_stages: int) -> None:
    m, length = tiny(), 10
    batch, value = random_batch(m, 2, length), random_batch(m, 2, length)
    for spec in split_layers(m, num_stages):
        stage = Stage(ModelContext(m, WeightGradQueue()), spec, length)
        init_stage(stage, m, seed=7)
        with torch.no_grad():
            left = stage(value)
        value = type(left)(left.x_BTD, batch)
    whole = Stage(ModelContext(m, WeightGradQueue()), split_layers(m, 1)[0], length)
    init_stage(whole, m, seed=7)
    with torch.no_grad():
        expected = fold(whole.phases, batch)
    assert torch.equal(left.ledger.main, expected.ledger.main)
    assert torch.equal(left.ledger.mtp, expected.ledger.mtp)


def test_initial_weights_do_not_depend_on_the_split() -> None:
    """Neither on stages nor on how experts are spread."""
    m = tiny()
    whole = Stage(ModelContext(m, WeightGradQueue()), split_layers(m, 1)[0], 8)
    init_stage(whole, m, seed=7)
    expected = whole.weights()
    for size in (1, 2, 4, 8):
        per_rank = m.num_routed_experts // size
        for rank in range(size):
            for spec in split_layers(m, 2):
                part = Stage(ModelContext(m, WeightGradQueue(), on_rank(rank, size)), spec, 8)
                init_stage(part, m, seed=7)
                for name, weight in part.weights().items():
                    same = expected[name]
                    if ".experts." in name:
                        same = same[rank * per_rank : (rank + 1) * per_rank]
                    assert torch.equal(weight, same), name


def test_initial_weights_are_normal_and_all_different() -> None:
    m = tiny(hidden_size=128, expert_ffn_size=64, init_std=0.006)
    stage = Stage(ModelContext(m, WeightGradQueue()), split_layers(m, 1)[0], 8)
    init_stage(stage, m, seed=7)
    weights = stage.weights()
    experts = weights["layers.1.experts.gate_up"]
    count = experts.numel()
    assert experts.std().item() == pytest.approx(0.006, rel=4 / count**0.5)
    assert abs(experts.mean().item()) < 4 * 0.006 / count**0.5
    assert len({w.flatten()[0].item() for w in [*experts, *weights["layers.2.experts.gate_up"]]}) == 32
    assert torch.equal(weights["final_norm"], torch.ones(128))
    other = Stage(ModelContext(m, WeightGradQueue()), split_layers(m, 1)[0], 8)
    init_stage(other, m, seed=8)
    assert not torch.equal(other.weights()["head"], weights["head"])


def test_a_shared_embedding_is_one_tensor() -> None:
    """DualPipe's end ranks hold the first and the last stage: the embedding of MTP is the first stage's."""
    m = tiny()
    first_spec, last_spec = split_layers(m, 2)
    context = ModelContext(m, WeightGradQueue())
    first = Stage(context, first_spec, 8)
    last = Stage(context, last_spec, 8, embedding=first.embed)
    assert last.weights()["embed"] is first.weights()["embed"]
