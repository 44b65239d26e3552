"""The wandb sink against a stand-in for the package and, where it is installed, once against it, offline."""

import importlib.util
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek_train.monitor import wandb_sink
from deepseek_train.monitor.metrics import EvalMetrics
from deepseek_train.monitor.wandb_sink import WandbSink, open_wandb
from tests.cpu.monitor_samples import STEP


@dataclass
class FakeRun:
    id: str = "abc"
    fails_at: int = 10**9
    logged: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, record: dict[str, Any]) -> None:
        if len(self.logged) + 1 >= self.fails_at:
            raise ConnectionError("service died")
        self.logged.append(record)

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing = failing
        self.inits: list[dict[str, Any]] = []
        self.Settings = SimpleNamespace

    def init(self, **arguments: Any) -> FakeRun:
        self.inits.append(arguments)
        if arguments["mode"] in self.failing:
            raise RuntimeError(f"no {arguments['mode']}")
        return FakeRun(id=arguments["id"] or "new")


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def start(
    monkeypatch: pytest.MonkeyPatch, package: Any, mode: Any, run_id: str | None = None
) -> WandbSink | None:
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(wandb_sink, "_unreachable", lambda: None)
    return open_wandb(mode, "project", "name", Path(tempfile.gettempdir()), {"a": 1}, run_id)


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize(
    ("mode", "key", "modes", "warnings"),
    [("auto", "", ["offline"], 0), ("auto", "k", ["online"], 0), ("online", "k", ["online"], 0),
     ("online", "", ["offline"], 1), ("offline", "k", ["offline"], 0), ("off", "k", [], 0)],
)  # fmt: skip
def test_modes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    mode: str, key: str, modes: list[str], warnings: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_API_KEY", key)
    package = FakeWandb()
    sink = start(monkeypatch, package, mode)
    assert [arguments["mode"] for arguments in package.inits] == modes
    assert (sink is None) == (mode == "off")
    assert len(capsys.readouterr().err.splitlines()) == warnings


@pytest.mark.usefixtures("no_key")
def test_key_of_wandb_login_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    package = FakeWandb()
    start(monkeypatch, package, "auto")
    assert package.inits[0]["mode"] == "online"


def test_online_that_fails_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    package = FakeWandb(failing=("online",))
    sink = start(monkeypatch, package, "auto", run_id="kept")
    assert sink is not None
    assert sink.run_id == "kept"
    assert [(a["mode"], a["id"], a["resume"]) for a in package.inits] == [
        ("online", "kept", "allow"),
        ("offline", "kept", None),
    ]
    assert capsys.readouterr().err == "wandb: could not start online: RuntimeError: no online\n"


def test_missing_package_and_total_failure_give_no_sink(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, None, "offline") is None  # None in sys.modules: import fails
    assert "not installed" in capsys.readouterr().err
    assert start(monkeypatch, FakeWandb(failing=("offline",)), "offline") is None
    assert "could not start offline" in capsys.readouterr().err


def test_an_exception_in_a_step_is_told_once_and_turns_the_sink_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = FakeRun(fails_at=2)
    sink = WandbSink(run)
    for _ in range(4):
        sink.step(STEP)
    sink.evaluation(EvalMetrics(120, 1, 3.3, None, 10))
    sink.close()
    assert len(run.logged) == 1
    assert not run.finished
    assert capsys.readouterr().err.count("ConnectionError: service died") == 1


def test_records_carry_step_and_tokens_and_no_missing_values() -> None:
    run = FakeRun()
    sink = WandbSink(run)
    sink.step(STEP)
    sink.evaluation(EvalMetrics(120, 7, 3.3, None, 10))
    sink.close()
    assert run.logged[0]["train/loss"] == STEP.loss
    assert run.logged[0]["train/load_max_over_mean"] == 1.5
    found = {k.removeprefix("max_violation/"): v for k, v in run.logged[0].items() if "violation" in k}
    assert found == {"worst": 0.5, "mean": 0.25, "layer_01": 0.5, "layer_02": 0.0}
    assert run.logged[1] == {"step": 120, "tokens": 7, "validation/loss": 3.3}
    assert run.finished


def test_the_real_package_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sink = open_wandb("offline", "project", "name", tmp_path, {"a": 1}, run_id="run42")
    if importlib.util.find_spec("wandb") is None:
        assert sink is None
        return
    assert sink is not None
    sink.step(STEP)
    sink.close()
    assert sink.run_id == "run42"
    assert list(tmp_path.glob("wandb/offline-run-*-run42/run-run42.wandb"))
    assert capfd.readouterr().out == ""
