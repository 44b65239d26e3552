"""From nested mappings to dataclasses: all problems at once, each with its mend."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import yaml
from hypothesis import given

from deepseek_train.config.check import check
from deepseek_train.config.parse import ConfigError, Problem, known_keys, parse, unknown_key
from deepseek_train.config.schema import (
    CurveConfig,
    ModelConfig,
    MonitorConfig,
    RunConfig,
    Segment,
)
from tests.paper.models import CONFIGS, models
from tests.paper.runs import mapping, run_config


def problems_of(kind: type, value: Any) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse(kind, value)
    return caught.value.problems


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
    assert (
        problem.what
        == "'dualpip' is not one of gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_v, dualpipe, dualpipe_v"
    )
    assert problem.mend == "Did you mean 'dualpipe'?"
    assert parse(MonitorConfig, yaml.safe_load("wandb: off")).wandb == "off"


def test_missing_keys_and_all_problems_at_once() -> None:
    broken = mapping(model__num_layers="x", schedule__name="zb_h3", trian=1)
    del broken["data"]["path"], broken["train"]
    problems = problems_of(RunConfig, broken)
    assert {p.where for p in problems} == {"model.num_layers", "schedule.name", "trian", "data.path", "train"}
    with pytest.raises(ConfigError, match=r"^5 problems in the configuration:\n  - ") as caught:
        parse(RunConfig, broken)
    assert all(str(problem) in str(caught.value) for problem in problems)


def test_a_group_that_is_no_group() -> None:
    (problem,) = problems_of(RunConfig, mapping(train=[1]))
    assert (problem.where, problem.mend) == ("train", "It has keys of its own: train.total_tokens=...")
