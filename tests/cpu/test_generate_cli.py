"""``deepseek-generate``: from runs, checkpoints and exports, and every kind of mistake."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.hf_export import export
from deepseek_train.cli import generate
from deepseek_train.cli.generate import main
from deepseek_train.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from deepseek_train.generate.continuation import continuation
from deepseek_train.generate.load import decoding_stage
from deepseek_train.generate.sampling import Sampling
from deepseek_train.model.stage import Stage
from tests.helpers.memory_source import MemorySource
from tests.helpers.models import disturb, tiny, whole_model

TOKENIZER = load_tokenizer("builtin")
M = tiny(vocab_size=TOKENIZER.vocab_size + 8, init_std=0.3)  # a few tokens more than have a meaning
PROMPT, TOKENS, CONTEXT = "import numpy", 12, 32
STAGE = whole_model(M, length=CONTEXT)
AVERAGED = whole_model(M, length=CONTEXT)
disturb(AVERAGED, seed=9)


def expected(stage: Stage, sampling: Sampling, *, seed: int = 0, bos: bool = False) -> str:
    """What the library says, which is compared with the training model elsewhere."""
    decoding = decoding_stage(MemorySource.of(stage), CONTEXT, torch.device("cpu"), torch.float32)
    ids = [TOKENIZER.special.bos] * bos + TOKENIZER.encode(PROMPT)
    found = continuation(
        decoding,
        ids,
        TOKENS,
        sampling,
        seed=seed,
        stop=TOKENIZER.special.eos,
        vocab_size=TOKENIZER.vocab_size,
    )
    return TOKENIZER.decode(list(found)) + "\n"


def save(root: Path, step: int, stage: Stage, averaged: Stage | None = None, **facts: object) -> Path:
    tensors: dict[str, Tensor] = {}
    for kind, one in ({"master": stage} | ({} if averaged is None else {"ema": averaged})).items():
        tensors |= {f"{kind}/{name}": weight.detach() for name, weight in one.weights().items()}
    tensors |= {f"router_bias/{layer}": router.bias for layer, router in stage.routers()}

    def produce(name: str, start: int, end: int) -> Iterator[Tensor]:
        yield tensors[name].flatten()[start:end]

    planned = [Planned(name, tensor.dtype, tensor.numel()) for name, tensor in tensors.items()]
    told = {"step": step, "model": asdict(stage.context.model), "tokenizer": TOKENIZER.sha256, **facts}
    return Path(write_alone(root, step, planned, produce, told))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints, of which the last has averages."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save(folder / "checkpoints", 5, AVERAGED)
    save(folder / "checkpoints", 10, STAGE, AVERAGED)
    (folder / "tokenizer.json").write_bytes(BUILTIN_TOKENIZER.read_bytes())
    (folder / "config.yaml").write_text(f"data: {{sequence_length: {CONTEXT}}}\ncheckpoint: {{path: null}}\n")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    extras = {"tokenizer.json": BUILTIN_TOKENIZER.read_bytes()}
    export(MemorySource.of(STAGE), folder, "fp32", extras=extras, tokens={}, shard_bytes=10**9)
    return folder


def printed(capsys: pytest.CaptureFixture[str], source: Path, *words: str) -> str:
    asked = [f"source={source}", f"prompt={PROMPT}", f"tokens={TOKENS}", "device=cpu", *words]
    assert main(asked) == 0
    return capsys.readouterr().out


def errors(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *told, last = captured.err.splitlines()
    assert last == "'deepseek-generate --help' shows what can be written."
    return [line.removeprefix("error: ") for line in told if line.startswith("error: ")]


def test_a_run_goes_on_from_its_newest_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, run) == expected(STAGE, Sampling())
    assert printed(capsys, run, "temperature=0") == expected(STAGE, Sampling(0.0))
    assert printed(capsys, run, "temperature=1", "top_p=1", "seed=3") == expected(
        STAGE, Sampling(1.0, 1.0), seed=3
    )
    assert printed(capsys, run, "bos=true") == expected(STAGE, Sampling(), bos=True)


def test_one_checkpoint_is_taken_by_its_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, run / "checkpoints" / "step-00000005")
    assert found == expected(AVERAGED, Sampling()) != expected(STAGE, Sampling())


def test_averaged_weights_are_their_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averaged = decoding_like(AVERAGED, STAGE)
    assert printed(capsys, run, "ema=true") == expected(averaged, Sampling()) != expected(STAGE, Sampling())


def decoding_like(weights: Stage, biases: Stage) -> Stage:
    """Router biases have no average: they are the last ones."""
    stage = whole_model(M, length=CONTEXT)
    with torch.no_grad():
        for name, weight in stage.weights().items():
            weight.copy_(weights.weights()[name])
        for (_, router), (_, other) in zip(stage.routers(), biases.routers(), strict=True):
            router.bias.copy_(other.bias)
    return stage


def test_an_export_says_the_same(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, exported) == expected(STAGE, Sampling())


def test_the_prompt_can_be_piped(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text(PROMPT)
    with (tmp_path / "prompt").open() as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert main([f"source={run}", "prompt=-", f"tokens={TOKENS}", "device=cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected(STAGE, Sampling())
    assert f"{3 * (16 + 4) * 4} bytes each" in captured.err


def test_a_damaged_checkpoint_is_passed_over_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "checkpoints", 5, STAGE)
    damaged = save(tmp_path / "checkpoints", 10, AVERAGED)
    file = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert printed(capsys, tmp_path, "tokenizer=builtin") == expected(STAGE, Sampling())
    assert "passed over" in caplog.text
    assert file.read_bytes() == content
    (only,) = errors(capsys, f"source={damaged}", "prompt=x", "tokenizer=builtin")
    assert file.name in only


def test_every_mistake_is_told_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = errors(
        capsys,
        f"source={run}",
        "prompt=" + "x = y\n" * 40,
        "tokens=0",
        "temperature=-1",
        "top_p=2",
        "seed=-1",
        "context=1",
        "device=tpu",
        "dtype=fp8",
        "sed=1",
        "ema=yes",
    )
    starts = [
        "there is no key 'sed'; did you mean 'seed'?",
        "ema=yes: write true or false",
        "temperature=-1.0",
    ]
    starts += ["top_p=2.0", "tokens=0", "seed=-1", "context=1", "device=tpu", "dtype=fp8", "a prompt of "]
    assert [start for start, line in zip(starts, told, strict=True) if not line.startswith(start)] == []


def test_prompt_and_answer_must_fit_what_was_trained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = len(TOKENIZER.encode(PROMPT))
    (only,) = errors(capsys, f"source={run}", f"prompt={PROMPT}", "tokens=100")
    assert f"a prompt of {prompt} tokens and 100 more are {prompt + 100}, but" in only
    assert f"was trained with {CONTEXT}: write tokens={CONTEXT - prompt}, or a larger context" in only
    fits = [f"source={run}", f"prompt={PROMPT}", "tokens=3", "device=cpu"]
    assert main([*fits, f"context={prompt + 3}"]) == 0
    capsys.readouterr()
    (only,) = errors(capsys, *fits, f"context={prompt + 2}")
    assert f"but context={prompt + 2}: write tokens=2" in only


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        ({"tokenizer": "0" * 64}, "trained with another tokenizer"),
        ({"model": None}, "does not say which model"),
    ],
    ids=["tokenizer", "model"],
)
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_it: dict[str, object], says: str
) -> None:
    path = save(tmp_path, 1, STAGE, **break_it)
    (only,) = errors(capsys, f"source={path}", "prompt=x", "tokenizer=builtin")
    assert says in only


def test_a_tokenizer_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, 1, whole_model(tiny(), length=CONTEXT))
    (only,) = errors(capsys, f"source={path}", "prompt=x", "tokenizer=builtin")
    assert "has 4096 tokens, the model 96: it is another model's" in only


def test_what_is_not_there(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = "prompt=x"
    (only,) = errors(capsys, f"source={tmp_path / 'nowhere'}", x)
    assert "is no folder; write a run" in only
    (only,) = errors(capsys, f"source={tmp_path}", x)
    assert "has no manifest.json, config.yaml or config.json" in only
    (tmp_path / "checkpoints").mkdir()
    (only,) = errors(capsys, f"source={tmp_path}", x)
    assert "holds no checkpoint" in only
    (only,) = errors(capsys, f"source={run / 'checkpoints' / 'step-00000005'}", x, "ema=true")
    assert "it holds no averaged weights" in only
    (only,) = errors(capsys, f"source={exported}", x, "ema=true")
    assert "an export has its weights once" in only
    (tmp_path / "config.yaml").write_text("model: {}\n")
    (only,) = errors(capsys, f"source={tmp_path}", x)
    assert "config.yaml is no run's" in only


def test_an_export_is_not_believed(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    (only,) = errors(capsys, f"source={tmp_path}", "prompt=x")
    assert "not a tokenizer.json" in only
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert any("model_type" in line for line in errors_with_more(capsys, f"source={tmp_path}", "prompt=x"))


def errors_with_more(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(list(words)) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("weight", "says"),
    [("layers.0.attention.o", "layer 1"), ("head", "logits of token 1 are not finite")],
)
def test_weights_that_are_not_finite(
    weight: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = whole_model(M, length=CONTEXT)
    with torch.no_grad():
        broken.weights()[weight].fill_(torch.inf)
    path = save(tmp_path, 1, broken)
    (only,) = errors(capsys, f"source={path}", "prompt=x", "tokenizer=builtin", "device=cpu")
    assert f"cannot generate: {says}" in only


def test_a_checkpoint_that_is_deleted_while_it_is_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run goes on meanwhile. One line."""
    shutil.copytree(run, tmp_path / "run")

    def after_it_is_gone(*arguments: Any) -> Any:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
        return decoding_stage(*arguments)

    monkeypatch.setattr(generate, "decoding_stage", after_it_is_gone)
    (only,) = errors(capsys, f"source={tmp_path / 'run'}", "prompt=x", "tokens=4", "device=cpu")
    assert "step-00000010 cannot be read: " in only


def test_ctrl_c_ends_it_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[int]:
        yield 5
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "continuation", interrupted)
    assert main([f"source={run}", "prompt=x", "tokens=4", "device=cpu"]) == 130
    assert capsys.readouterr().err == "\ndeepseek-generate: stopped\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "usage: deepseek-generate" in capsys.readouterr().out
