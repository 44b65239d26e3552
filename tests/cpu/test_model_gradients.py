"""Gradients of phases, tape and weight-gradient queue, against ordinary autograd and finite differences, in
FP64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.stage import Stage
from deepseek_train.parallel.p2p import Links
from deepseek_train.phases.phase import Phase, fold
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.values import Hidden, MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue, run_works
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary, LossScales
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.overlap import Role
from tests.helpers.hf import hf_model, published
from tests.helpers.models import YARN, main_grads, random_batch, table_tensors, tiny, whole_model
from tests.helpers.plain import Plain

LENGTH = 40
SCALES = LossScales(main=1.0, mtp=0.3, balance=0.7)
MODELS = {
    "compressed queries": tiny(),
    "yarn, direct queries, two mtp modules": tiny(yarn=YARN, q_lora_rank=None, mtp_depth=2),
    "tied head": tiny(tie_embeddings=True),
}


def fp64(m: ModelConfig) -> Stage:
    return whole_model(m, length=LENGTH, dtype=torch.float64, grads=torch.float64)


def forward(stage: Stage, batch: MicroBatch) -> tuple[Tape, Hidden]:
    tape, value = Tape(), batch
    for phase in stage.phases:
        value = tape.run(phase, value)
    assert isinstance(value, Hidden)
    return tape, value


def backward(
    stage: Stage, batch: MicroBatch, scales: LossScales = SCALES, *, immediate: bool = True
) -> Hidden:
    """Gradients of one micro-batch into ``main_grad`` (or the queue's open group)."""
    tape, hidden = forward(stage, batch)
    tape.seed([None, *scales.gradients(hidden.ledger)])
    while len(tape):
        tape.backward()
        if immediate:
            run_works(stage.context.queue.take_open())
    return hidden


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    """Every tensor's largest difference, relative to its largest element. An expert without tokens has
    exactly zero."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error < bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_every_gradient_is_that_of_plain_autograd(m: ModelConfig) -> None:
    stage, batch = fp64(m), random_batch(m, 3, LENGTH)
    state = published(table_tensors(stage), m)
    trained = {name: t.requires_grad_() for name, t in state.items() if not name.endswith("correction_bias")}
    losses = Plain(m, {**{n: t.double() for n, t in state.items()}, **trained}).losses(batch.tokens)
    (SCALES.main * losses.main + SCALES.mtp * losses.mtp + SCALES.balance * losses.balance).backward()
    theirs = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in trained.items()}
    without = {name for name, gradient in theirs.items() if not gradient.any()}
    assert len(without) <= 3  # one expert may get no token
    assert all(".mlp.experts." in name for name in without)

    hidden = backward(stage, batch)
    for ours, expected in zip(
        (hidden.ledger.main, hidden.ledger.mtp, hidden.ledger.balance),
        (losses.main, losses.mtp, losses.balance),
        strict=True,
    ):
        assert ours is not None
        assert (ours - expected).abs() < 1e-12
    assert_close(published(main_grads(stage), m), theirs, 1e-12)


def test_gradients_of_the_main_loss_are_those_of_transformers() -> None:
    """In FP32: transformers' norms, router and softmax never run in FP64."""
    m = tiny(mtp_depth=0)
    stage, batch = whole_model(m, length=LENGTH), random_batch(m, 2, LENGTH)
    model = hf_model(m, published(table_tensors(stage), m))
    logits = model(batch.tokens[:, :LENGTH]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten()).backward()
    theirs: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(grad.unflatten(1, (2, -1)).unbind()):
                theirs[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                theirs[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(grad):
                theirs[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            theirs[name] = grad
    backward(stage, batch, replace(SCALES, balance=0.0))
    assert_close(published(main_grads(stage), m), theirs, 2e-5)


@pytest.mark.parametrize("loss", ["main", "mtp", "balance"])
def test_finite_differences_along_a_random_direction(loss: str) -> None:
    """One loss at a time. The step 1e-6 is far below what flips a choice of experts, and 1e-6^2 bounds the
    curvature."""
    m = tiny(mtp_depth=2)
    stage, batch = fp64(m), random_batch(m, 2, LENGTH)
    backward(stage, batch, replace(LossScales(0.0, 0.0, 0.0), **{loss: 1.0}))
    generator = torch.Generator().manual_seed(5)
    weights = stage.weights()
    direction = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()}
    slope = sum(float((w.main_grad * direction[n]).sum()) for n, w in weights.items())

    @torch.no_grad()
    def value(step: float) -> float:
        for name, weight in weights.items():
            weight.add_(step * direction[name])
        found = float(getattr(fold(stage.phases, batch).ledger, loss))
        for name, weight in weights.items():
            weight.sub_(step * direction[name])
        return found

    measured = (value(1e-6) - value(-1e-6)) / 2e-6
    assert abs(slope) > 1e-3
    assert measured == pytest.approx(slope, rel=1e-6)


def test_balance_loss_reaches_nothing_behind_its_routers() -> None:
    m = tiny()
    stage, batch = fp64(m), random_batch(m, 2, LENGTH)
    backward(stage, batch, LossScales(0.0, 0.0, 1.0))
    touched = {name for name, weight in stage.weights().items() if weight.main_grad.any()}
    assert "mtp.0.block.router.weight" in touched
    assert not touched & {"head", "mtp.0.final_norm", "mtp.0.block.experts.down"}


def test_grad_is_never_used_and_gradients_add_up() -> None:
    m = tiny()
    stage, batch = fp64(m), random_batch(m, 2, LENGTH)
    backward(stage, batch)
    assert all(weight.grad is None for weight in stage.parameters())
    once = {name: g.clone() for name, g in main_grads(stage).items()}
    backward(stage, batch)
    assert_close(main_grads(stage), {name: 2 * g for name, g in once.items()}, 1e-14)


def test_queued_weight_gradients_are_the_immediate_ones_bit_for_bit() -> None:
    """Three micro-batches, their weight gradients sealed and run in the order they came."""
    m = tiny()
    batches = [random_batch(m, 2, LENGTH, seed) for seed in range(3)]
    immediate, queued = fp64(m), fp64(m)
    for batch in batches:
        backward(immediate, batch)
    queue = queued.context.queue
    for batch in batches:
        backward(queued, batch, immediate=False)
        queue.seal(queue.take_open())
    assert not any(g.any() for g in main_grads(queued).values())
    assert len(queue) == 3
    while len(queue):
        queue.run_oldest()
    for name, grad in main_grads(immediate).items():
        assert torch.equal(grad, main_grads(queued)[name]), name


def test_executor_runs_the_same_backward() -> None:
    m = tiny()
    batches = [random_batch(m, 2, LENGTH, seed) for seed in range(3)]
    by_hand, run = fp64(m), fp64(m)
    for batch in batches:
        backward(by_hand, batch)
    boundary = Boundary((2, LENGTH, m.hidden_size), torch.float64, torch.device("cpu"))
    executor = Executor({0: run}, no_links(), run.context.queue, boundary)
    ran = executor.run(PreparedSchedule(make_schedule("1f1b", 1, 3), 0), batches.__getitem__, SCALES)
    assert sorted(ran.main) == [0, 1, 2]
    for name, grad in main_grads(by_hand).items():
        assert torch.equal(grad, main_grads(run)[name]), name


def no_links() -> Links:
    """A single rank sends nothing."""
    return Links({}, ranks=(0,), me=0)


@dataclass(frozen=True)
class Two:
    a: Tensor
    b: Tensor
    label: str = "kept"


def taped(run: Callable[[Any], Any], value: Any, gradients: list[Tensor | None]) -> list[Tensor | None]:
    tape = Tape()
    tape.run(Phase("one", Role.ATTEND, run), value)
    tape.seed(gradients)
    tape.backward()
    return tape.gradients()


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def test_tape_passes_an_untouched_input_through() -> None:
    got = taped(lambda v: v, Two(leaf(1.0), leaf(2.0)), [torch.tensor([3.0]), torch.tensor([5.0])])
    assert got == [torch.tensor([3.0]), torch.tensor([5.0])]


def test_tape_adds_the_gradients_of_an_input_that_is_used_and_passed_through() -> None:
    got = taped(
        lambda v: replace(v, b=v.a * v.b),
        Two(leaf(2.0), leaf(7.0)),
        [torch.tensor([1.0]), torch.tensor([10.0])],
    )
    assert got == [torch.tensor([71.0]), torch.tensor([20.0])]


def test_tape_unused_outputs_and_inputs_have_no_gradient() -> None:
    value = Two(leaf(2.0), leaf(7.0))
    assert taped(lambda v: replace(v, b=v.b * 3), value, [None, torch.tensor([1.0])]) == [
        None,
        torch.tensor([3.0]),
    ]
    assert taped(lambda v: v, value, [None, None]) == [None, None]


def test_tape_of_two_phases_goes_backward_one_by_one() -> None:
    tape = Tape()
    value = Two(leaf(2.0), torch.tensor([4.0]))  # b is data: no gradient is asked for
    value = tape.run(Phase("scale", Role.ATTEND, lambda v: replace(v, a=v.a * v.b)), value)
    value = tape.run(Phase("square", Role.ATTEND, lambda v: replace(v, a=v.a.square())), value)
    assert value.label == "kept"
    with pytest.raises(RuntimeError, match="seed"):
        tape.backward()
    tape.seed([torch.tensor([1.0])])
    tape.backward()
    assert tape.gradients() == [torch.tensor([16.0])]
    assert len(tape) == 1
    tape.backward()
    assert tape.gradients() == [torch.tensor([64.0])]
    assert len(tape) == 0


def test_tape_refuses_the_wrong_number_of_gradients() -> None:
    with pytest.raises(ValueError):
        taped(lambda v: v, Two(leaf(1.0), leaf(2.0)), [torch.tensor([3.0])])


def test_queue_groups_run_first_in_first_out() -> None:
    queue, ran = WeightGradQueue(), []
    for group in ("ab", "c"):
        for item in group:
            queue.add(lambda item=item: ran.append(item))  # type: ignore[misc]
        queue.seal(queue.take_open())
    queue.add(lambda: ran.append("open"))
    queue.run_oldest()
    assert ran == ["a", "b"]
    run_works(queue.take_open())
    queue.run_oldest()
    assert ran == ["a", "b", "open", "c"]
    assert len(queue) == 0
