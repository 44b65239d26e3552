"""Every YAML file in ``configs/`` parses into the schema, and every experiment passes the checks of a launch."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_train.cli.compose import CONFIG_DIR, compose_config
from deepseek_train.cli.train_help import SHORT
from deepseek_train.config.curve import value_at
from deepseek_train.config.parse import ConfigError
from deepseek_train.spec.weights import all_weights, count_parameters
from deepseek_train.train.device import memory_problems
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.preflight import preflight

GROUP_FILES = sorted(p for p in CONFIG_DIR.glob("*/*.yaml") if p.parent.name != "experiment")
EXPERIMENTS = sorted(p.stem for p in (CONFIG_DIR / "experiment").glob("*.yaml"))
DATA = ["data.path=shards", "data.source=text"]  # what the experiments on own data ask for


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_choice_of_every_group_parses(path: Path) -> None:
    config = compose_config([f"{path.parent.name}={path.stem}", *(DATA if path.stem == "own" else [])])
    assert count_parameters(all_weights(config.model)) > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_could_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose_config([f"experiment={name}", *DATA])
    assert config.name == name
    assert preflight(config, resolve_layout(config, None).world) == []


def test_the_recipe_of_deepseek_v3() -> None:
    """V3 report section 4.2."""
    optim = compose_config(["optim=deepseek_v3", "train=deepseek_v3"]).optim
    trillion = 10**12
    assert [value_at(optim.lr, t) for t in (0, trillion, 10 * trillion)] == [0.0, 2.2e-4, 2.2e-4]
    assert value_at(optim.lr, 14_300_000_000_000) == pytest.approx(2.2e-5)
    assert value_at(optim.lr, 14_700_000_000_000) == 7.3e-6
    assert value_at(optim.batch_size, 0) == 3072
    assert value_at(optim.batch_size, trillion) == 15360
    assert [value_at(optim.balance_speed, t * trillion / 10) for t in (1, 142, 144)] == [1e-3, 1e-3, 0.0]
    assert [value_at(optim.mtp_weight, t * trillion) for t in (1, 9, 11)] == [0.3, 0.3, 0.1]


def test_all_mistakes_of_a_command_line_are_told_together() -> None:
    overrides = [
        "experiment=tinny",
        "train.total_token=1",
        "paralel.pp=2",
        "model.num_heads=two",
        "what is this",
    ]
    with pytest.raises(ConfigError) as error:
        compose_config(overrides)
    told = str(error.value)
    for part in ("tinny", "'train.total_tokens'", "'parallel.pp'", "model.num_heads", "what is this"):
        assert part in told


def test_a_key_of_the_fp8_recipe_does_not_turn_fp8_on() -> None:
    scale = "precision.fp8.activations.scale=pow2"
    with pytest.raises(ConfigError, match=r"precision.fp8.activations.scale: .* Write precision=fp8 as well"):
        compose_config(["experiment=tiny", "precision=bf16", scale])
    recipe = compose_config(["experiment=tiny", scale, "precision=fp8"]).precision.fp8
    assert recipe is not None
    assert recipe.activations.scale == "pow2"


def test_a_model_that_this_machine_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": 8 << 20, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    config = compose_config(["experiment=h100_proxy", "cluster.device=cpu"])
    layout = resolve_layout(config, None)
    (problem,) = memory_problems(config, layout)
    assert problem.what.startswith("2.57B parameters with gradients and moments take 33.5 GiB at least")
    monkeypatch.setitem(pages, "SC_PHYS_PAGES", 9 << 20)
    assert not memory_problems(config, layout)


def test_keys_that_no_yaml_mentions_can_be_overridden() -> None:
    assert compose_config(["experiment=tiny", "train.stop_after_seconds=3"]).train.stop_after_seconds == 3.0


def test_curves_follow_the_length_of_the_run() -> None:
    lr = compose_config(["experiment=tiny", "train.total_tokens=1e6"]).optim.lr
    assert lr.segments[-1].until == 1_000_000


COMMAND = re.compile(
    r" *(?:deepseek-train|torchrun .*deepseek_train\.cli\.train) ([^\[<#]*?)(?:  |\.\.\.|#|$)"
)


def shown_commands() -> list[list[str]]:
    """Arguments of every `deepseek-train` and torchrun line in README and usage, as a reader would type them."""
    root = Path(__file__).parents[2]
    found = []
    for text in ((root / "README.md").read_text(), SHORT):
        for line in text.splitlines():
            match = COMMAND.match(line)
            if match:
                found.append([a for a in match[1].split() if a != "--cfg"])
    return found


@pytest.mark.parametrize("arguments", shown_commands(), ids=" ".join)
def test_commands_that_are_shown_could_start(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose_config(arguments or ["experiment=tiny"])
    if config.name != "deepseek_v3":
        # Weights to begin with are not there, and need not be to see that the rest is sound.
        assert preflight(replace(config, init_from=None), None) == []


def test_2048_ranks_are_not_started_on_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = preflight(compose_config(["experiment=deepseek_v3", *DATA]), None)
    assert "2048 ranks" in problem.what
    assert "torchrun" in problem.mend
