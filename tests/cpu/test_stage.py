"""Modules against the table of weights, for every number of stages."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.parallel.expert.dispatcher import Planned, flat
from deepseek_train.parallel.expert.group import ExpertGroup
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.values import Hidden, Ledger, MicroBatch
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, allocate_main_grads, run_works
from deepseek_train.spec.stages import StageSpec, split_layers, stage_weights
from tests.helpers.models import main_grads, random_batch, tiny, whole_model

LENGTH = 10
MODELS = {
    "v3": tiny(num_layers=5),
    "no mtp, direct queries": tiny(num_layers=5, mtp_depth=0, q_lora_rank=None),
    "deep mtp, no shared experts": tiny(num_layers=5, mtp_depth=3, num_shared_experts=0),
    "all dense": tiny(num_layers=5, num_dense_layers=5),
    "tied head": tiny(num_layers=5, tie_embeddings=True),
    "tied head, no mtp": tiny(num_layers=5, mtp_depth=0, tie_embeddings=True),
}


def on_rank(rank: int, size: int) -> Planned:
    """Enough of a group to build and fill weights: nothing is exchanged."""
    return flat(ExpertGroup(rank, size, node_size=size))


@pytest.mark.parametrize("num_stages", range(1, 8))  # 7: only the inner stages have layers
@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_modules_hold_exactly_the_weights_of_the_table(m: ModelConfig, num_stages: int) -> None:
    for spec in split_layers(m, num_stages):
        stage = Stage(ModelContext(m, WeightGradQueue()), spec, length=8)
        table = stage_weights(m, spec)
        assert {n: tuple(w.shape) for n, w in stage.weights().items()} == {
            w.name: w.shape for w in table if w.trained
        }
        buffers = {f"{n}.router.bias" for n in (_router_owner(m, i) for i, _ in stage.routers())}
        assert buffers == {w.name for w in table if not w.trained}
        assert {b.shape for b in stage.buffers()} <= {(m.num_routed_experts,)}


def _router_owner(m: ModelConfig, index: int) -> str:
    return f"layers.{index}" if index < m.num_layers else f"mtp.{index - m.num_layers}.block"


def test_every_parameter_is_a_weight_of_the_queue() -> None:
    """``weights`` leaves out anything that is not: such a parameter would never be trained."""
    stage = whole_model(tiny(), length=8)
    assert all(isinstance(p, Weight) for p in stage.parameters())
    assert len(stage.weights()) == len(list(stage.parameters()))


@pytest.mark.parametrize(
    ("num_stages", "layers"), [(2, "1|2"), (2, "3|0"), (2, "0|3"), (3, "1*3"), (3, "0|3|0"), (5, "0|1*3|0")]
)
@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_stages_in_a_row_compute_the_whole_model(m: ModelConfig, num_stages: int, layers: str) -> None:
    """Losses bit for bit; gradients too, but for the embedding's, whose uses on two stages are added up."""
    m = replace(m, num_layers=3, num_dense_layers=min(3, m.num_dense_layers))
    stages = built(m, split_layers(m, num_stages, layers=layers))
    (whole,) = built(m, split_layers(m, 1))
    ledger, expected = train(stages, random_batch(m, 2, LENGTH)), train([whole], random_batch(m, 2, LENGTH))
    assert torch.equal(ledger.main, expected.main)
    assert ledger.mtp is expected.mtp is None or torch.equal(ledger.mtp, expected.mtp)

    found: dict[str, list[Tensor]] = {}
    for stage in stages:
        for name, gradient in main_grads(stage).items():
            found.setdefault(name, []).append(gradient)
    assert found.keys() == main_grads(whole).keys()
    for name, gradient in main_grads(whole).items():
        if name == "embed":
            assert len(found[name]) == (2 if m.mtp_depth or m.tie_embeddings else 1)
            assert all(part.any() for part in found[name])
            assert (sum(found[name]) - gradient).abs().max() <= 1e-14 * gradient.abs().max()
        else:
            assert torch.equal(found[name][0], gradient), name


def built(m: ModelConfig, specs: tuple[StageSpec, ...]) -> list[Stage]:
    stages = [Stage(ModelContext(m, WeightGradQueue(), dtype=torch.float64), spec, LENGTH) for spec in specs]
    for stage in stages:
        init_stage(stage, m, seed=7)
        allocate_main_grads(list(stage.weights().values()), torch.float64)
    return stages


def train(stages: list[Stage], batch: MicroBatch) -> Ledger:
    """One micro-batch forward and backward through all stages, all losses counting; the last stage's ledger."""
    value: MicroBatch | Hidden = batch
    tapes: list[tuple[Stage, Tape, Hidden]] = []
    for stage in stages:
        tape = Tape()
        if isinstance(value, Hidden):
            value = Hidden(value.x_BTD.detach().requires_grad_(), batch if stage.spec.last else None)
        for phase in stage.phases:
            value = tape.run(phase, value)
        assert isinstance(value, Hidden)
        tapes.append((stage, tape, value))
    gradient: Tensor | None = None
    for stage, tape, left in reversed(tapes):
        losses = (left.ledger.main, left.ledger.mtp, left.ledger.balance)
        tape.seed([gradient, *(torch.ones_like(loss) for loss in losses if loss is not None)])
        while len(tape):
            tape.backward()
        gradient, *_ = tape.gradients() or [None]
        run_works(stage.context.queue.take_open())
    return tapes[-1][2].ledger


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
                    same: Tensor = expected[name]
                    if ".experts." in name:
                        same = same[rank * per_rank : (rank + 1) * per_rank]
                    assert torch.equal(weight, same), name


def test_initial_weights_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    m, found = tiny(), []
    for threads in (1, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        stage = Stage(ModelContext(m, WeightGradQueue()), split_layers(m, 1)[0], 8)
        init_stage(stage, m, seed=7)
        found.append(stage.weights())
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name


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


def test_a_tied_head_is_the_embedding() -> None:
    """One tensor on one stage, under the embedding's name and with its initial values; logits are products with it."""
    m = tiny(tie_embeddings=True, embed_init_std=0.5)
    (whole,) = built(m, split_layers(m, 1))
    weights = whole.weights()
    assert "head" not in weights
    assert whole.head.weight is weights["embed"]
    assert weights["embed"].std().item() == pytest.approx(0.5, rel=0.1)
    first, last = built(m, split_layers(m, 2))
    assert torch.equal(last.weights()["embed"], first.weights()["embed"])
    x_BTD = torch.randn(2, LENGTH, m.hidden_size, dtype=torch.float64)
    normed = x_BTD / (x_BTD.square().mean(-1, keepdim=True) + m.norm_eps).sqrt()  # gains are 1
    logits = torch.einsum("btd,vd->btv", normed, first.weights()["embed"])
    assert (last.logits(Hidden(x_BTD)) - logits).abs().max() < 1e-12
