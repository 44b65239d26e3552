"""A whole model in FP8: what is FP8, copies of weights, recomputation to the bit and to the byte, skipped steps."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import CurveConfig, Forgettable, Fp8Config, ModelConfig, OptimConfig
from deepseek_train.fp8.rounding import Rounding
from deepseek_train.model.stage import Stage
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.optim.replicated import Replicated
from deepseek_train.phases.parcel import arrived
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.wgrad import run_works
from deepseek_train.pipeline.values import LossScales
from tests.helpers.memory import MadeTensors
from tests.helpers.models import main_grads, random_batch, tiny, whole_model

B, T = 2, 10
FINE: frozenset[Forgettable] = frozenset({"norm", "mla_up", "swiglu"})
KINDS: dict[str, frozenset[Forgettable]] = {
    "norm": frozenset({"norm"}),
    "fine": FINE,
    "block": frozenset({"block"}),
}
STORAGE = {
    "v3": Fp8Config(),
    "all in FP8": Fp8Config(attention_output="fp8"),
    "as it is": Fp8Config(attention_output="params", swiglu_inputs="params"),
}
NEVER = CurveConfig(0.0)
OPTIM = OptimConfig(NEVER, NEVER, NEVER, NEVER)


def fp8_model(m: ModelConfig, recipe: Fp8Config | None = STORAGE["v3"], **kwargs: Any) -> Stage:
    return whole_model(m, length=T, dtype=torch.bfloat16, fp8=recipe, **kwargs)


def forward(stage: Stage, seed: int = 3) -> tuple[Tape, Any]:
    tape, value = Tape(), random_batch(stage.context.model, B, T, seed)
    for phase in stage.phases:
        value = tape.run(phase, value)
    return tape, arrived(value)


def train(stage: Stage, seed: int = 3, main: float = 1.0) -> dict[str, Tensor]:
    tape, hidden = forward(stage, seed)
    tape.seed([None, *LossScales(main, 0.3, 0.1).gradients(hidden.ledger)])
    while len(tape):
        tape.backward()
    run_works(stage.context.queue.take_open())
    losses = {"main": hidden.ledger.main, "mtp": hidden.ledger.mtp, "balance": hidden.ledger.balance}
    return {name: loss.detach() for name, loss in losses.items() if loss is not None}


@pytest.mark.parametrize(
    "m", [tiny(), tiny(q_lora_rank=None, num_shared_experts=0)], ids=["v3", "direct queries"]
)
def test_every_linear_that_v3_names_is_fp8_and_nothing_else(
    m: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V3_SPEC D.1; each weight is quantised once, whatever the number of micro-batches, until it has changed."""
    quantised: list[Tensor] = []
    blocks = Rounding.blocks
    monkeypatch.setattr(Rounding, "blocks", lambda rule, w: quantised.append(w) or blocks(rule, w))
    stage = fp8_model(m)
    names = {w.data_ptr(): name for name, w in stage.weights().items()}
    for seed in range(3):
        train(stage, seed)
    found = Counter(names[w.data_ptr()] for w in quantised)
    wide = ("embed", "head", "router.weight")
    assert found.keys() == {n for n, w in stage.weights().items() if w.ndim > 1 and not n.endswith(wide)}
    assert set(found.values()) == {1}
    assert stage.context.fp8 is not None
    stage.context.fp8.copies.forget()
    train(stage)
    assert Counter(names[w.data_ptr()] for w in quantised) == found + found


def test_copies_are_of_the_weights_as_they_are_after_a_step() -> None:
    stage = fp8_model(tiny())
    before = train(stage)
    with torch.no_grad():
        for weight in stage.weights().values():
            weight.mul_(1.5)
    assert stage.context.fp8 is not None
    stage.context.fp8.copies.forget()
    after, fresh = train(stage), fp8_model(tiny())
    with torch.no_grad():
        for weight in fresh.weights().values():
            weight.mul_(1.5)
    assert train(fresh) == after
    assert after != before


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("recipe", STORAGE.values(), ids=STORAGE)
def test_recomputation_changes_no_bit(recipe: Fp8Config, kinds: frozenset[Forgettable]) -> None:
    kept, forgetting = fp8_model(tiny(), recipe), fp8_model(tiny(), recipe, recompute=kinds)
    assert train(kept) == train(forgetting)
    for name, gradient in main_grads(kept).items():
        assert gradient.any(), name
        assert torch.equal(gradient, main_grads(forgetting)[name]), name


def bytes_kept(m: ModelConfig, kinds: frozenset[Forgettable]) -> int:
    stage = fp8_model(m, recompute=kinds)
    train(stage)  # copies of weights are there
    fp8 = stage.context.fp8
    assert fp8 is not None
    with MadeTensors([*stage.parameters(), *stage.buffers()]) as made:
        tape, hidden = forward(stage)
        del hidden
        kept = made.bytes_alive()
    assert len(tape)
    return kept


@pytest.mark.parametrize("num_dense", [0, 1])
def test_forgotten_norms_take_their_fp8_with_them(num_dense: int) -> None:
    """One layer and an MTP module, to the byte. Tiles are 128 wide, and so is everything in this model."""
    m = tiny(num_layers=1, num_dense_layers=num_dense)
    moe = 2 - num_dense
    inputs = (
        2 * 3 + num_dense + 2 * moe + 1
    )  # of down-projections, of both up-projections, of FFNs, of MTP's join
    heads = 2  # keep what they read in BF16: the final norm's result and MTP's
    expected = B * T * (inputs * (128 + 4) + moe * m.hidden_size * 4 + heads * m.hidden_size * 2)
    assert bytes_kept(m, frozenset()) - bytes_kept(m, KINDS["norm"]) == expected


def test_near_the_loss_in_bf16() -> None:
    m = tiny(num_dense_layers=3, mtp_depth=0)  # a router would answer small differences with other experts
    found, wanted = (train(fp8_model(m, recipe))["main"] for recipe in (Fp8Config(), None))
    assert 0.0 < abs(found - wanted) < 0.02 * wanted


def test_nan_reaches_the_loss_and_the_step_is_skipped() -> None:
    stage = fp8_model(tiny(num_dense_layers=3, mtp_depth=0))
    weights = dict(stage.weights())
    with torch.no_grad():
        weights["layers.1.ffn.gate_up"][3, 5] = torch.nan
    optimizer = Replicated([WeightGroup(weights, None, 0.0)], None, OPTIM, torch.float32)
    before = {name: w.detach().clone() for name, w in weights.items()}
    assert train(stage)["main"].isnan()
    outcome = optimizer.step(1e-3)
    assert outcome.skipped
    for name, weight in weights.items():
        assert torch.equal(weight.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_a_gradient_that_overflows_skips_the_step() -> None:
    """Gradients of all sizes are fine in FP8, but for those that BF16 does not have."""
    stage = fp8_model(tiny())
    optimizer = Replicated([WeightGroup(dict(stage.weights()), None, 0.0)], None, OPTIM, torch.float32)
    for main, skipped in ((1e-12, False), (1e12, False), (torch.inf, True)):
        assert all(loss.isfinite() for loss in train(stage, main=main).values())
        assert optimizer.step(1e-3).skipped == skipped
        assert stage.context.fp8 is not None
        stage.context.fp8.copies.forget()
