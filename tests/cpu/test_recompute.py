"""Recomputation changes what is kept and nothing else: bitwise results, bytes to the last one, one run each.

Legend of sizes: B sequences, T positions.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from deepseek_train.config.schema import Forgettable, ModelConfig
from deepseek_train.model.stage import Stage
from deepseek_train.parallel.expert.local import ByIndex, reduce
from deepseek_train.parallel.expert.plan import Arrivals
from deepseek_train.phases.parcel import arrived
from deepseek_train.phases.phase import Phase
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.wgrad import run_works
from deepseek_train.pipeline.values import LossScales
from deepseek_train.schedule.overlap import Role
from tests.helpers.counting import PHASES, Counts, count
from tests.helpers.memory import MadeTensors
from tests.helpers.models import main_grads, random_batch, tiny, whole_model

B, T = 2, 10
FINE: frozenset[Forgettable] = frozenset({"norm", "mla_up", "swiglu"})
KINDS: dict[str, frozenset[Forgettable]] = {
    "norm": frozenset({"norm"}),
    "mla_up": frozenset({"mla_up"}),
    "swiglu": frozenset({"swiglu"}),
    "fine": FINE,
    "block": frozenset({"block"}),
    "all": FINE | {"block"},
}
MODELS = {
    "v3": tiny(),
    "dense": tiny(num_dense_layers=3, mtp_depth=0),
    "direct queries, heads of one size, no shared experts": tiny(
        q_lora_rank=None, v_head_dim=12, num_shared_experts=0, mtp_depth=2
    ),
}
every_kind = pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)


def forward(stage: Stage, seed: int = 3) -> tuple[Tape, Any]:
    tape, value = Tape(), random_batch(stage.context.model, B, T, seed)
    for phase in stage.phases:
        value = tape.run(phase, value)
    return tape, arrived(value)


def backward(tape: Tape, ledger: Any) -> None:
    """Input gradients; weight gradients are left in the queue."""
    tape.seed([None, *LossScales(1.0, 0.3, 0.1).gradients(ledger)])
    while len(tape):
        tape.backward()


def losses_and_gradients(stage: Stage) -> dict[str, Tensor]:
    tape, hidden = forward(stage)
    backward(tape, hidden.ledger)
    run_works(stage.context.queue.take_open())
    losses = {"main": hidden.ledger.main, "mtp": hidden.ledger.mtp, "balance": hidden.ledger.balance}
    return {name: loss for name, loss in losses.items() if loss is not None} | main_grads(stage)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_every_bit_is_that_of_a_step_that_keeps_all(
    m: ModelConfig, dtype: torch.dtype, kinds: frozenset[Forgettable]
) -> None:
    grads = torch.promote_types(dtype, torch.float32)
    expected = losses_and_gradients(whole_model(m, length=T, dtype=dtype, grads=grads))
    found = losses_and_gradients(whole_model(m, length=T, dtype=dtype, grads=grads, recompute=kinds))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def bytes_kept(m: ModelConfig, dtype: torch.dtype, kinds: frozenset[Forgettable]) -> int:
    """By the graph of a forward pass."""
    stage = whole_model(m, length=T, dtype=dtype, recompute=kinds)
    with MadeTensors([*stage.parameters(), *stage.buffers()]) as made:
        tape, hidden = forward(stage)
        del hidden
        kept = made.bytes_alive()
    assert len(tape)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_dense", [0, 1])
def test_each_kind_frees_what_it_names(num_dense: int, dtype: torch.dtype) -> None:
    """One layer and an MTP module, to the byte."""
    m = tiny(num_layers=1, num_dense_layers=num_dense)
    assert m.q_lora_rank is not None
    rows, item, blocks, moe = B * T, dtype.itemsize, 2, 2 - num_dense
    wide = 0 if dtype is torch.float32 else torch.float32.itemsize  # the router's own copy of its input
    norms = blocks * (2 * m.hidden_size + m.q_lora_rank + m.kv_lora_rank) + (1 + 2 + 1) * m.hidden_size
    # Queries, keys, and what values are a part of.
    heads = 2 * (m.qk_nope_head_dim + m.qk_rope_head_dim) + m.qk_nope_head_dim + m.v_head_dim
    swiglus = moe * (m.experts_per_token + m.num_shared_experts) * m.expert_ffn_size
    expected: dict[frozenset[Forgettable], int] = {
        KINDS["norm"]: rows * (norms * item + moe * m.hidden_size * wide),
        KINDS["mla_up"]: rows * blocks * m.num_heads * heads * item,
        KINDS["swiglu"]: rows * (swiglus + num_dense * m.dense_ffn_size) * item,
    }
    # The head's normalised result is what MTP's norm saves, so that one is freed just once.
    everything = bytes_kept(m, dtype, frozenset())
    assert {kinds: everything - bytes_kept(m, dtype, kinds) for kinds in expected} == expected
    assert everything - bytes_kept(m, dtype, FINE) == sum(expected.values())


def test_blocks_keep_what_enters_their_phases() -> None:
    """A dense layer more: the input of attention and that of the feed-forward network."""
    few, many = tiny(num_dense_layers=2, num_layers=2), tiny(num_dense_layers=3, num_layers=3)
    added = bytes_kept(many, torch.float32, KINDS["block"]) - bytes_kept(few, torch.float32, KINDS["block"])
    assert added == 2 * B * T * many.hidden_size * 4


@dataclass(frozen=True)
class Rows:
    x: Tensor


@pytest.mark.parametrize(
    "run",
    [
        lambda rows: Rows(rows.x * 2.0),
        lambda rows: Rows(rows.x.index_select(0, torch.tensor([1, 1, 0]))),
        lambda rows: Rows(
            reduce(
                rows.x,
                ByIndex(Arrivals(2, torch.tensor([1, 0, 1]), torch.tensor([]), ())),
            )
        ),
    ],
    ids=["elementwise", "rows picked", "rows summed"],
)
def test_the_tape_keeps_no_input_that_no_function_saved(run: Callable[[Rows], Rows]) -> None:
    """Rows that were received, rows that came back, the residual stream: the largest tensors of a MoE layer."""
    tape, x = Tape(), torch.randn(3, 4, requires_grad=True)
    storage = StorageWeakRef(x.untyped_storage())
    y = tape.run(Phase("p", Role.EXPERTS, run), Rows(x)).x
    expected = torch.autograd.grad(run(Rows(x)).x, x, torch.ones_like(y))
    del x
    assert storage.expired()
    tape.seed([torch.ones_like(y)])
    tape.backward()
    assert torch.equal(tape.gradients()[0], expected[0])


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return count(monkeypatch.setattr)


@every_kind
def test_everything_runs_once_and_what_is_forgotten_once_more(
    kinds: frozenset[Forgettable], counts: Counts
) -> None:
    stage = whole_model(tiny(), length=T, recompute=kinds)
    tape, hidden = forward(stage)
    first, phases = Counter(counts.forward), Counter(counts.phases)
    assert all(region.runs == 1 for region in counts.regions)
    backward(tape, hidden.ledger)
    after_inputs = Counter(counts.forward)
    run_works(stage.context.queue.take_open())
    assert counts.forward == after_inputs  # weight gradients compute nothing anew
    assert counts.backward == first
    assert len(counts.works) == counts.functions_with_weight
    assert all(ran == [1] for ran in counts.works)
    again = counts.forward - first
    whole = "block" in kinds
    for owner, name in PHASES:
        key = f"{owner.__name__}.{name}"
        assert counts.phases[key] == phases[key] * (2 if whole else 1), key
    assert counts.phases["MoeBlock.plan"] == phases["MoeBlock.plan"]
    if whole:
        # Three blocks and MTP's; the first is dense. Linears: 5 of attention, router, shared experts' 2 or FFN's 2.
        blocks = {"_Linear": 3 * 8 + 7, "_GroupedLinear": 3 * 2, "_SwiGlu": 3 * 2 + 1, "_RmsNorm": 4 * 4}
        outside = {"_RmsNorm": 4} if "norm" in kinds else {}  # final norms, MTP's two before its block
        assert again == Counter(blocks) + Counter(outside)
    else:
        forgotten = [region for region in counts.regions if region.kind in kinds and region.makes]
        assert forgotten
        assert all(r.runs == (2 if any(r is f for f in forgotten) else 1) for r in counts.regions)
        norms = {"_RmsNorm": first["_RmsNorm"]} if "norm" in kinds else {}
        ups = {"_Linear": 4 * 2} if "mla_up" in kinds else {}
        swiglus = {"_SwiGlu": first["_SwiGlu"]} if "swiglu" in kinds else {}
        assert again == Counter(norms) + Counter(ups) + Counter(swiglus)


def test_without_recomputation_phases_are_left_alone() -> None:
    row = whole_model(tiny(), length=T).phases
    assert Recomputation().row(row) is row
    assert Recomputation(frozenset({"block"})).row(row) is row


class Doubling:
    """A region of a small graph: y = f(x), then y squared, which saves y."""

    def __init__(self) -> None:
        self.runs = 0
        self.recompute = Recomputation(KINDS["norm"])

    def double(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * 2.0

    def region(self, x: Tensor) -> Tensor:
        return self.recompute.region("norm", self.double, x)

    def forgetting(self, run: Any, x: Tensor) -> Tensor:
        found: Tensor = self.recompute._forgetting(run)(x)
        return found


def test_regions_in_a_chain_and_views_of_their_results_run_once_more() -> None:
    one, x = Doubling(), torch.randn(4, 6, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        twice = one.region(one.region(x))
        left, right = twice.split(3, -1)
        return (left.square() + right.t().square().t() + twice.square()[:, ::2]).sum()

    one.forgetting(run, x).backward()
    plain = x.detach().requires_grad_()
    left, right = (plain * 4.0).split(3, -1)
    (left.square() + right.square() + (plain * 4.0).square()[:, ::2]).sum().backward()
    assert x.grad is not None
    assert plain.grad is not None
    assert torch.equal(x.grad, plain.grad)
    assert one.runs == 4


def test_what_is_derived_from_something_forgotten_is_forgotten_too() -> None:
    one, x = Doubling(), torch.randn(3, requires_grad=True)
    runs = []

    def negative(y: Tensor) -> Tensor:
        runs.append(y)
        return -y

    def run(x: Tensor) -> Tensor:
        forgotten = one.recompute.derived(negative, one.region(x))
        kept = one.recompute.derived(negative, x)
        return (forgotten.square() + kept.square()).sum()

    one.forgetting(run, x).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * (x.detach() * 2.0) * 2.0 + 2 * x.detach())
    assert (one.runs, len(runs)) == (2, 3)


def test_a_result_written_to_is_kept() -> None:
    one, x = Doubling(), torch.randn(3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        y = one.region(x)
        y.add_(1.0)
        return y.square().sum()

    one.forgetting(run, x).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * (x.detach() * 2.0 + 1.0) * 2.0)
    assert one.runs == 1


def test_a_view_of_an_input_is_no_result() -> None:
    one, x = Doubling(), torch.randn(3, 2, requires_grad=True)
    base = x * 1.0
    view = one.recompute.region("norm", lambda t: t.flatten(), base)
    assert view.untyped_storage() is base.untyped_storage()
    assert len(one.recompute._products) == 0


def test_nothing_is_remembered_longer_than_the_graph() -> None:
    one, x = Doubling(), torch.randn(3, requires_grad=True)
    y = one.forgetting(lambda x: one.region(x).square().sum(), x)
    assert len(one.recompute._products) == 0  # the result itself is gone; the recipe hangs on the graph
    y.backward()
    with torch.no_grad():
        kept = one.region(x)
    assert kept is not None
    assert len(one.recompute._products) == 0
