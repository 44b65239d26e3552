"""What a launch is told before anything starts: pipelines that cannot be, each with the nearest numbers that can."""

from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_train.cli.compose import CONFIG_DIR
from deepseek_train.parallel.expert.deep_ep_problems import Load, Machine, deep_ep_problems
from deepseek_train.schedule.catalog import NAMES, make_schedule, placement_of
from deepseek_train.schedule.check import check
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train import expert_plan
from deepseek_train.train.batching import eval_microbatches, microbatches_for
from deepseek_train.train.expert_plan import node_problems, plan_experts
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.preflight import preflight
from deepseek_train.train.stage_plan import num_stages, plan_stages
from tests.helpers.preflight import tiny, told


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "where", "said"),
    [
        (["parallel.pp=3"], "parallel.pp", ["even number", "got 3", "parallel.pp=2 or parallel.pp=4."]),
        (["parallel.pp=1"], "parallel.pp", ["even number", "Nearest that will do: parallel.pp=2."]),
        (
            ["parallel.pp=6", "schedule=1f1b"],
            "parallel.pp",
            ["3 layers cannot fill the 6 stages of 1f1b on 6 ranks", "Nearest that will do: parallel.pp=5."],
        ),
        (
            ["parallel.pp=3", "schedule=dualpipe_v"],
            "parallel.pp",
            ["3 layers cannot fill the 6 stages of dualpipe_v on 3 ranks", "parallel.pp=2."],
        ),
        (
            ["schedule=interleaved_1f1b", "schedule.stages_per_rank=6", "parallel.pp=1"],
            "parallel.pp",
            ["fill the 6 stages", "No pp will do for interleaved_1f1b: use schedule=1f1b"],
        ),
        (
            ["model.num_layers=1", "model.num_dense_layers=0", "parallel.pp=5"],
            "parallel.pp",
            ["even number", "parallel.pp=2."],
        ),
        (["parallel.pp=1000000000"], "parallel.pp", ["1000000000 stages", "parallel.pp=4."]),
        (
            ["optim.batch_size.start=7"],
            "optim.batch_size",
            ["too small for dualpipe", "optim.batch_size.start=8 or more."],
        ),
        (
            ["schedule=dualpipe_v", "optim.batch_size.start=7", "train.microbatch_size=2"],
            "optim.batch_size",
            ["4 micro-batches of 2", "optim.batch_size.start=16 or more, or a smaller train.microbatch_size"],
        ),
        (
            ["schedule=1f1b", "optim.batch_size.start=1"],
            "optim.batch_size",
            ["1 micro-batches of 1 sequences on each of 2", "optim.batch_size.start=2 or more."],
        ),
        (
            ["optim.batch_size.segments=[{until: 9000, to: 4, shape: linear}]"],
            "optim.batch_size",
            ["at 9000 tokens", "Write optim.batch_size.segments[0].to=8 or more."],
        ),
        (
            ["parallel.layers=2|2"],
            "parallel.layers",
            ["places 4 layers, the model has 3", "Write 3|0 or the like"],
        ),
        (["parallel.layers=1*3"], "parallel.layers", ["3 stages, the pipeline has 2"]),
        (["parallel.layers=3", "schedule=zb_v"], "parallel.layers", ["1 stages, the pipeline has 4"]),
        (["parallel.layers=two"], "parallel.layers", ["'two'"]),
    ],
)
def test_what_is_wrong_with_a_pipeline_and_the_nearest_that_works(
    overrides: list[str], where: str, said: list[str]
) -> None:
    found = told(*overrides)
    assert {key for key, _ in found} - {"parallel"} == {
        where
    }  # parallel: more ranks than one machine may start
    for words in said:
        assert any(words in text for _, text in found), found


def test_all_that_is_wrong_is_told_at_once() -> None:
    found = told("parallel.layers=9|9", "optim.batch_size.start=1", "parallel.dp=2", "resume=must")
    assert [key for key, _ in found] == ["parallel.layers", "optim.batch_size", "resume"]
    found = told(
        "parallel.pp=7", "resume=must"
    )  # seven stages, neither even nor to be filled with three layers
    assert [key for key, _ in found] == ["parallel.pp", "parallel.pp", "resume"]


def test_what_is_proposed_works() -> None:
    for overrides in (
        ["parallel.pp=4", "optim.batch_size.start=16"],
        ["parallel.pp=5", "schedule=1f1b"],
        ["parallel.pp=2", "schedule=dualpipe_v"],
        ["optim.batch_size.start=16", "train.microbatch_size=2", "schedule=dualpipe_v"],
        ["parallel.layers=3|0"],
        ["parallel.layers=0|3"],
        ["parallel.pp=1", "schedule=1f1b", "parallel.layers=3"],
    ):
        assert told(*overrides) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("evaluated", [1, 4, 7])
def test_every_schedule_trains_and_evaluates(name: str, evaluated: int) -> None:
    """Each has its YAML file; stages and micro-batches of training and evaluation fit its placement."""
    assert (CONFIG_DIR / "schedule" / f"{name}.yaml").is_file()
    config = tiny(f"schedule={name}", "model.num_layers=4", f"train.eval_microbatches={evaluated}")
    assert config.schedule.name == name
    assert preflight(config, None) == []
    layout, per_rank = ParallelLayout(pp=2, dp=2, ep=2), config.schedule.stages_per_rank
    schedule = make_schedule(name, 2, microbatches_for(config, layout, 0), per_rank)
    evaluation = placement_of(name, 2, eval_microbatches(config), per_rank)
    check(schedule)
    check(forward_only(evaluation))
    assert evaluation.ranks_SX == schedule.placement.ranks_SX
    assert evaluation.num_microbatches in (evaluated, evaluated + 1)
    assert len(plan_stages(config, 2)) == evaluation.num_stages == num_stages(config, 2)


MIRRORS = ["parallel.ep_across_mirrors=true", "parallel.pp=2", "parallel.ep=4"]


def test_experts_across_mirrors_fit_on_half_the_data_parallel_ranks() -> None:
    config = tiny(*MIRRORS)
    assert preflight(config, None) == []
    assert resolve_layout(config, None) == ParallelLayout(2, 2, 4, mirrored=True)
    assert resolve_layout(config, 16) == ParallelLayout(2, 8, 4, mirrored=True)
    (problem,) = (p for p in preflight(config, 6) if p.where == "parallel.ep")
    assert "4 does not divide the 6 data-parallel ranks of two mirrored pipeline ranks" in problem.what


@pytest.mark.parametrize("name", [name for name in (*NAMES, "auto") if name != "dualpipe"])
def test_only_dualpipe_has_mirrors_to_share_experts(name: str) -> None:
    ((where, said),) = told(*MIRRORS, f"schedule={name}")
    assert where == "parallel.ep_across_mirrors"
    assert name in said
    assert "schedule=dualpipe" in said


@pytest.mark.parametrize(
    ("gpus", "dispatcher", "per_node"), [(8, "flat", 4), (4, "flat", 4), (2, "two_hop", 2), (1, "flat", 1)]
)
def test_the_dispatcher_knows_the_nodes_of_mirrored_ranks(gpus: int, dispatcher: str, per_node: int) -> None:
    config = tiny(*MIRRORS, f"cluster.gpus_per_node={gpus}")
    plan = plan_experts(config, resolve_layout(config, None))
    assert (plan.dispatcher, plan.ranks_per_node) == (dispatcher, per_node)


def test_interleaved_stages_are_as_many_as_asked_for() -> None:
    config = tiny("schedule=interleaved_1f1b", "schedule.stages_per_rank=3", "model.num_layers=6")
    assert preflight(config, None) == []
    assert len(plan_stages(config, 2)) == 6


def test_layers_by_hand_reach_the_stages() -> None:
    by_hand = tiny("parallel.layers=1|2")
    assert [s.layers for s in plan_stages(by_hand, 2)] == [(0,), (1, 2)]
    assert [s.layers for s in plan_stages(tiny(), 2)] == [(0, 1, 2), ()]


def test_deep_ep_is_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither library nor GPU, whatever machine the tests run on."""
    machine = Machine(None, "No module named 'deep_ep'", cuda=False)
    monkeypatch.setattr(expert_plan, "this_machine", lambda cuda_allowed: machine)
    found = told("parallel.dispatcher=deep_ep", "model.hidden_size=96")
    assert {where for where, _ in found} == {"parallel.dispatcher"}
    texts = [text for _, text in found]
    for words in (
        "deep_ep, but DeepEP cannot be imported (No module named 'deep_ep')",
        "no CUDA device",
        "rows would travel as FP32",
        "model.hidden_size 96 is no multiple of 128",
    ):
        assert any(words in text for text in texts), texts
    assert len(texts) == 4
    assert all("parallel.dispatcher=auto" in text for text in texts)


def test_nobody_gets_deep_ep_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_plan, "this_machine", lambda cuda_allowed: Machine(2, None, cuda=True))
    config = tiny("precision.params=bf16")
    assert plan_experts(config, ParallelLayout(pp=2, dp=2, ep=2)).dispatcher == "flat"


LOAD = Load(8, 8, 7168, "bf16", ("fp8", "bf16"))


@pytest.mark.parametrize(
    ("generation", "load", "said"),
    [
        (1, LOAD, []),
        (2, LOAD, []),
        (1, replace(LOAD, ep=64), []),
        (1, replace(LOAD, ep=16, ranks_per_node=4), ["16 expert-parallel ranks are 4 on each node"]),
        (1, replace(LOAD, ep=8, ranks_per_node=None), ["8 expert-parallel ranks are unevenly on nodes"]),
        (2, replace(LOAD, ep=16, ranks_per_node=4), []),
        (1, replace(LOAD, hidden_size=8192), ["over 8064"]),
        (1, replace(LOAD, hidden_size=8192, ep=16), []),
        (2, replace(LOAD, hidden_size=8192), []),
        (2, replace(LOAD, ep=1, ranks_per_node=1), ["nothing travels"]),
        (2, replace(LOAD, params="fp32"), []),
        (2, replace(LOAD, params="fp32", formats=("fp8", "params")), ["as FP32"]),
    ],
)
def test_what_deep_ep_itself_demands(generation: int, load: Load, said: list[str]) -> None:
    found = deep_ep_problems(load, Machine(generation, None, cuda=True))
    assert len(found) == len(said), found
    for words, text in zip(said, found, strict=True):
        assert words in text


@pytest.mark.parametrize(
    ("world", "here", "refused"), [(8, 4, True), (8, 8, False), (16, 8, False), (32, 16, False)]
)
def test_nodes_do_not_span_machines(world: int, here: int, refused: bool) -> None:
    config = tiny("parallel.pp=1", "parallel.ep=8", "schedule=1f1b", "cluster.gpus_per_node=8")
    found = node_problems(config, world, here)
    assert [p.where for p in found] == ["cluster.gpus_per_node"] * refused
    assert all("4 ranks were started on this machine, of 8 in all" in p.what for p in found)
    assert node_problems(tiny("parallel.ep=1"), world, here) == []
