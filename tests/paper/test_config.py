"""From nested mappings to dataclasses, and the rules between fields: all problems at once, each with its
mend."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_train.config.check import check
from deepseek_train.config.parse import ConfigError, Problem, known_keys, parse, unknown_key
from deepseek_train.config.schema import (
    CurveConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    Segment,
)
from tests.paper.models import CONFIGS, models


def mapping(**changes: Any) -> dict[str, Any]:
    """A sound run as YAML gives it; ``changes`` by dotted key with ``__`` for the dot."""
    run: dict[str, Any] = {
        "name": "test",
        "model": {
            **{"name": "m", "vocab_size": 64, "hidden_size": 16, "num_layers": 4, "num_dense_layers": 1},
            **{"num_heads": 2, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4},
            **{"q_lora_rank": None, "kv_lora_rank": 4, "dense_ffn_size": 16, "num_routed_experts": 16},
            **{"num_shared_experts": 1, "expert_ffn_size": 8, "experts_per_token": 4},
            **{"num_expert_groups": 4, "expert_groups_per_token": 2, "routed_scale": 2.5},
        },
        "parallel": {},
        "schedule": {},
        "precision": {},
        "data": {"path": "datasets/x"},
        "optim": {
            "lr": {"start": 0.0, "segments": [{"until": 100, "to": 1e-3, "shape": "linear"}]},
            "batch_size": {"start": 8},
            "balance_speed": {"start": 0.001},
            "mtp_weight": {"start": 0.3},
        },
        "train": {"total_tokens": 1000},
        "checkpoint": {},
        "monitor": {},
        "cluster": {},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        group = run
        for part in path:
            group = group[part]
        group[last] = value
    return run


def run_config(**changes: Any) -> RunConfig:
    return parse(RunConfig, mapping(**changes))


def problems_of(kind: type, value: Any) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse(kind, value)
    return caught.value.problems


# ---- parse


def test_a_sound_run_is_parsed_and_has_no_problems() -> None:
    run = run_config()
    assert run.optim.lr == CurveConfig(0.0, (Segment(100, 1e-3, "linear"),))
    assert run.model.q_lora_rank is None
    assert run.schedule.name == "dualpipe"
    assert check(run) == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_models_are_sound(path: Any) -> None:
    model = parse(ModelConfig, yaml.safe_load(path.read_text()))
    assert model.name == path.stem
    assert check(replace(run_config(), model=model)) == []


def as_mapping(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: as_mapping(getattr(value, one.name)) for one in fields(value)}
    return [as_mapping(item) for item in value] if isinstance(value, tuple) else value


@given(models())
def test_parsing_gives_back_what_was_written(m: ModelConfig) -> None:
    assert parse(ModelConfig, yaml.safe_load(yaml.safe_dump(as_mapping(m)))) == m


@pytest.mark.parametrize(
    ("key", "where", "mend"),
    [
        ("model__hiden_size", "model.hiden_size", "Did you mean 'model.hidden_size'?"),
        ("trian", "trian", "Did you mean 'train'?"),
        ("optim__beta_1", "optim.beta_1", "Did you mean 'optim.beta1'?"),
        ("model__zzz", "model.zzz", "deepseek-train --cfg` prints"),
    ],
)
def test_an_unknown_key_names_its_nearest(key: str, where: str, mend: str) -> None:
    (problem,) = problems_of(RunConfig, mapping(**{key: 1}))
    assert (problem.where, problem.what) == (where, "no such key")
    assert mend in problem.mend


def test_a_key_in_the_wrong_group_is_found() -> None:
    problem = unknown_key("train.hidden_size", known_keys(RunConfig))
    assert problem.mend == "Did you mean 'model.hidden_size'?"
    assert "optim.lr.segments" in known_keys(RunConfig)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("model__num_layers", "many", "expected int, found 'many'"),
        ("model__num_layers", 4.5, "expected int, found 4.5"),
        ("model__num_layers", None, "expected int, found None"),
        ("model__num_layers", True, "expected int, found True"),
        ("model__num_layers", [4], "expected int, found [4]"),
        ("model__num_layers", float("inf"), "expected int, found inf"),
        ("model__q_lora_rank", "none", "expected int, found 'none'"),
        ("model__routed_scale", "a lot", "expected float, found 'a lot'"),
        ("parallel__check_splits", "yes", "expected bool, found 'yes'"),
        ("parallel__check_splits", 1, "expected bool, found 1"),
        ("data__path", None, "expected str, found None"),
        ("data__path", ["a"], "expected str, found ['a']"),
        ("optim__lr", 1e-3, "expected a group of keys, found 0.001"),
        ("optim__lr", {"start": 0.0, "segments": 5}, "expected a list, found 5"),
    ],
)
def test_a_wrong_type_says_what_was_expected(key: str, value: Any, what: str) -> None:
    (problem,) = problems_of(RunConfig, mapping(**{key: value}))
    assert problem.what == what
    assert problem.where.startswith(key.replace("__", "."))


def test_items_of_a_list_are_named_by_their_position() -> None:
    segments = [{"until": 5}, {"until": "x", "sape": "linear"}]
    where = {p.where for p in problems_of(RunConfig, mapping(optim__lr={"start": 0.0, "segments": segments}))}
    assert where == {"optim.lr.segments[1].until", "optim.lr.segments[1].sape"}


@pytest.mark.parametrize(
    ("text", "value"), [("1e12", 10**12), ("14.8e12", 14_800 * 10**9), (1e12, 10**12), ("42", 42)]
)
def test_numbers_that_lose_nothing_fit_into_int(text: Any, value: int) -> None:
    total = run_config(train__total_tokens=text).train.total_tokens
    assert (total, type(total)) == (value, int)


def test_large_whole_numbers_are_kept_exactly() -> None:
    """Not through float, which has 53 bits."""
    assert run_config(train__total_tokens=2**60 + 1).train.total_tokens == 2**60 + 1


def test_yaml_leaves_1e_4_a_text_and_it_is_still_a_float() -> None:
    assert (
        run_config(**yaml.safe_load("optim__sequence_balance_weight: 1e-4")).optim.sequence_balance_weight
        == 1e-4
    )
    assert isinstance(run_config(optim__eps=1).optim.eps, float)


def test_choices() -> None:
    (problem,) = problems_of(RunConfig, mapping(schedule__name="dualpip"))
    assert problem.what == "'dualpip' is not one of dualpipe, 1f1b"
    assert problem.mend == "Did you mean 'dualpipe'?"
    assert parse(MonitorConfig, yaml.safe_load("wandb: off")).wandb == "off"


def test_missing_keys_and_all_problems_at_once() -> None:
    broken = mapping(model__num_layers="x", schedule__name="gpipe", trian=1)
    del broken["data"]["path"], broken["train"]
    problems = problems_of(RunConfig, broken)
    assert {p.where for p in problems} == {"model.num_layers", "schedule.name", "trian", "data.path", "train"}
    with pytest.raises(ConfigError, match=r"^5 problems in the configuration:\n  - ") as caught:
        parse(RunConfig, broken)
    assert all(str(problem) in str(caught.value) for problem in problems)


def test_a_group_that_is_no_group() -> None:
    (problem,) = problems_of(RunConfig, mapping(train=[1]))
    assert (problem.where, problem.mend) == ("train", "Indent its keys below it.")


# ---- check


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
        ({"parallel__pp": 8}, "parallel.pp", "4 layers cannot fill 8"),
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
        ({"train__sample_tokens": -1}, "train.sample_tokens", "negative"),
        ({"data__validation_percent": 0}, "data.validation_percent", "nothing to evaluate"),
        ({"data__validation_percent": 100}, "data.validation_percent", "nothing to train"),
        ({"cluster__timeout_seconds": 0}, "cluster.timeout_seconds", "at least 1"),
        ({"cluster__rendezvous_seconds": 0}, "cluster.rendezvous_seconds", "at least 1"),
        ({"cluster__threads_per_rank": 0}, "cluster.threads_per_rank", "at least 1"),
        ({"cluster__gpus_per_node": 0}, "cluster.gpus_per_node", "at least 1"),
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
    assert [p.where.split(".")[0] for p in check(run)] == ["model", "parallel", "optim", "monitor", "data"]


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
