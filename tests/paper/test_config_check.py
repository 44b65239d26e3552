"""The rules between fields: every problem at once, each with its mend."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_train.config.check import check
from deepseek_train.config.schema import OptimConfig, ParallelConfig
from tests.paper.runs import run_config


def across_mirrors(**changes: Any) -> dict[str, Any]:
    """Sound but for ``changes``."""
    sound = {"parallel__pp": 2, "parallel__dp": 2, "parallel__ep": 4}
    return {"parallel__ep_across_mirrors": True, **sound, **changes}


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"model__hidden_size": 0}, "model.hidden_size", "at least 1"),
        ({"model__q_lora_rank": 0}, "model.q_lora_rank", "at least 1"),
        ({"model__mtp_depth": -1}, "model.mtp_depth", "negative"),
        ({"model__num_shared_experts": -1}, "model.num_shared_experts", "negative"),
        ({"model__num_dense_layers": 5}, "model.num_dense_layers", "5 dense layers in a model of 4"),
        ({"model__qk_rope_head_dim": 3}, "model.qk_rope_head_dim", "odd"),
        ({"model__qk_nope_head_dim": 3}, "model.qk_nope_head_dim", "odd"),
        ({"model__kv_lora_rank": 5}, "model.kv_lora_rank", "odd"),
        ({"model__num_expert_groups": 3}, "model.num_expert_groups", "3 groups do not divide 16"),
        (
            {"model__expert_groups_per_token": 8, "model__experts_per_token": 8},
            "model.expert_groups_per_token",
            "8 gr",
        ),
        ({"model__experts_per_token": 10}, "model.experts_per_token", "only 8 experts"),
        ({"model__experts_per_token": 3}, "model.experts_per_token", "not a multiple"),
        (
            {
                "model__num_expert_groups": 16,
                "model__expert_groups_per_token": 1,
                "model__experts_per_token": 4,
            },
            "model.num_expert_groups",
            "fewer experts than K/M",
        ),
        ({"parallel__pp": 0}, "parallel.pp", "at least 1"),
        ({"parallel__dp": 6, "parallel__ep": 4}, "parallel.ep", "does not divide data-parallel size 6"),
        ({"parallel__ep": 3}, "parallel.ep", "16 routed experts do not divide evenly over 3"),
        (across_mirrors(schedule__name="1f1b"), "parallel.ep_across_mirrors", "under schedule 1f1b no two"),
        (across_mirrors(schedule__name="dualpipe_v"), "parallel.ep_across_mirrors", "schedule dualpipe_v"),
        (across_mirrors(schedule__name="auto"), "parallel.ep_across_mirrors", "under schedule auto"),
        (across_mirrors(parallel__pp=3), "parallel.ep_across_mirrors", "of 3 pipeline ranks one has none"),
        (across_mirrors(parallel__ep=1), "parallel.ep_across_mirrors", "parallel.ep is 1"),
        (across_mirrors(parallel__dp=3), "parallel.ep", "4 does not divide the 6 ranks of two mirrored"),
        (across_mirrors(parallel__ep=6), "parallel.ep", "16 routed experts do not divide evenly over 6"),
        ({"schedule__stages_per_rank": 0}, "schedule.stages_per_rank", "at least 1"),
        ({"optim__beta2": 1.0}, "optim.beta2", "not in [0, 1)"),
        ({"optim__beta1": -0.1}, "optim.beta1", "not in [0, 1)"),
        ({"optim__batch_size": {"start": 0}}, "optim.batch_size", "falls to 0"),
        ({"optim__lr": {"start": -1.0}}, "optim.lr", "falls to -1"),
        ({"optim__lr": {"start": float("nan")}}, "optim.lr", "not finite"),
        (
            {"optim__lr": {"start": 0.0, "segments": [{"until": 1, "to": float("inf"), "shape": "linear"}]}},
            "optim.lr",
            "not finite",
        ),
        ({"optim__eps": 0.0}, "optim.eps", "not a positive number"),
        ({"optim__eps": float("nan")}, "optim.eps", "not a positive number"),
        ({"optim__ema_decay": 1.0}, "optim.ema_decay", "not in [0, 1)"),
        ({"train__guard__loss_factor": 0.9}, "train.guard.loss_factor", "would be a spike"),
        ({"train__guard__norm_factor": float("nan")}, "train.guard.norm_factor", "would be a spike"),
        ({"train__guard__mean_steps": 0}, "train.guard.mean_steps", "at least 1"),
        ({"train__guard__max_skips": -1}, "train.guard.max_skips", "negative"),
        ({"train__guard__max_rollbacks": -1}, "train.guard.max_rollbacks", "negative"),
        ({"train__check_replicas_every": -1}, "train.check_replicas_every", "negative"),
        ({"train__recompute": ["norm", "block"]}, "train.recompute", "'block' beside norm"),
        ({"train__sample_tokens": -1}, "train.sample_tokens", "negative"),
        ({"data__validation_percent": 0}, "data.validation_percent", "nothing to evaluate"),
        ({"data__validation_percent": 100}, "data.validation_percent", "nothing to train"),
        ({"cluster__timeout_seconds": 0}, "cluster.timeout_seconds", "at least 1"),
        ({"cluster__rendezvous_seconds": 0}, "cluster.rendezvous_seconds", "at least 1"),
        ({"cluster__threads_per_rank": 0}, "cluster.threads_per_rank", "at least 1"),
        ({"cluster__gpus_per_node": 0}, "cluster.gpus_per_node", "at least 1"),
        ({"cluster__peak_tflops": 0.0}, "cluster.peak_tflops", "not the TFLOP/s of a GPU"),
        ({"train__total_tokens": 0}, "train.total_tokens", "at least 1"),
        ({"train__eval_every": -1}, "train.eval_every", "negative"),
        ({"checkpoint__every": -5}, "checkpoint.every", "negative"),
        ({"checkpoint__keep": 0}, "checkpoint.keep", "at least 1"),
        ({"monitor__log_every": 0}, "monitor.log_every", "at least 1"),
        ({"data__sequence_length": 0}, "data.sequence_length", "at least 1"),
        ({"data__max_megabytes": 0}, "data.max_megabytes", "at least 1"),
        ({"data__fim_rate": 1.5}, "data.fim_rate", "not a share"),
        ({"precision__moments": "bf16", "optim__beta2": 0.999}, "precision.moments", "rounding step"),
    ],
)
def test_every_rule(changes: dict[str, Any], where: str, what: str) -> None:
    problems = check(run_config(**changes))
    assert [p.where for p in problems if what in p.what] == [where], problems
    assert all(p.mend for p in problems)


def test_expert_groups_across_mirrors_may_be_twice_as_large() -> None:
    assert check(run_config(**across_mirrors())) == []
    (problem,) = check(run_config(**across_mirrors(parallel__ep_across_mirrors=False)))
    assert problem.where == "parallel.ep"


@pytest.mark.parametrize(
    ("segments", "what"),
    [
        ([{"until": 0}], "ends at 0 tokens, where it begins"),
        ([{"until": 9}, {"until": 9}], "ends at 9 tokens"),
        ([{"until": 9, "to": 1.0}], "shape constant with to=1.0"),
        ([{"until": 9, "shape": "linear"}], "shape linear with to=None"),
    ],
)
def test_curves_go_forward_and_say_where_to(segments: list[dict[str, Any]], what: str) -> None:
    (problem,) = check(run_config(optim__mtp_weight={"start": 1.0, "segments": segments}))
    assert problem.where == f"optim.mtp_weight.segments[{len(segments) - 1}]"
    assert what in problem.what


def test_check_reports_all_problems_of_all_groups() -> None:
    run = run_config(
        model__qk_rope_head_dim=3, parallel__ep=3, optim__beta1=2, data__fim_rate=-1, monitor__log_every=0
    )
    assert [p.where.split(".")[0] for p in check(run)] == ["model", "parallel", "monitor", "data", "optim"]


@example(16, 4, 0, 4)
@given(*[st.integers(-2, 20)] * 4)
def test_check_never_fails_on_odd_numbers(experts: int, groups: int, kept: int, top_k: int) -> None:
    run = run_config()
    model = replace(
        run.model,
        num_routed_experts=experts,
        num_expert_groups=groups,
        expert_groups_per_token=kept,
        experts_per_token=top_k,
    )
    run = replace(run, model=model, parallel=ParallelConfig(ep=kept, dp=top_k))
    sound = experts >= 1 and groups >= 1 and experts % groups == 0 and 1 <= kept <= groups
    sound = sound and top_k >= 1 and top_k % kept == 0 and top_k // kept <= experts // groups
    assert sound == (not [p for p in check(run) if p.where.startswith("model.")])


def test_optimizer_defaults_are_those_of_the_report() -> None:
    optim: OptimConfig = run_config().optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
