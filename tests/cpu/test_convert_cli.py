"""``deepseek-convert`` as it is called."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.stored import newest_whole
from deepseek_train.checkpoint.weight_source import open_weights
from deepseek_train.cli.convert import main
from deepseek_train.config.schema import ModelConfig
from deepseek_train.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from tests.helpers.hf_folders import assert_same, change_config, config_of, random_weights, store, tensors_of
from tests.helpers.models import YARN, tiny

TOKENIZER = load_tokenizer("builtin")
M = tiny(name="mine", num_layers=2, vocab_size=TOKENIZER.vocab_size, embed_init_std=0.5)


def a_run(folder: Path, m: ModelConfig = M) -> Path:
    """A run's folder, as far as it matters here."""
    store(folder / "checkpoints", m, random_weights(m), tokenizer=TOKENIZER.sha256)
    (folder / "tokenizer.json").write_bytes(TOKENIZER.json)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_there_and_back_and_there_again(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, first, back, second = (tmp_path / name for name in ("run", "first", "back", "second"))
    a_run(run)
    assert (
        main(["to_hf", f"source={run}", f"target={first}", f"dtype={dtype}", "shard_gigabytes=0.0005"]) == 0
    )
    printed, errors = capsys.readouterr()
    assert f"{first}: mine of {run / 'checkpoints' / 'step-'}" in printed
    assert "model.layers.2.*) as unexpected" in printed
    assert errors == ""  # no bar where nobody looks
    assert main(["from_hf", f"source={first}", f"target={back}"]) == 0
    assert f"{back / 'checkpoints' / 'step-00000000'}: mine" in capsys.readouterr().out
    assert main(["to_hf", f"source={back}", f"target={second}", f"dtype={dtype}"]) == 0
    assert_same(tensors_of(first), tensors_of(second))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    facts = newest_whole(back).facts
    assert facts["imported_from"] == "first"
    assert facts["tokenizer"] == TOKENIZER.sha256
    assert open_weights(back).model == M
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "first", "run", "second"]


def test_transformers_loads_model_and_tokenizer(tmp_path: Path) -> None:
    a_run(tmp_path / "run", replace(M, mtp_depth=0, yarn=YARN))
    assert main(["to_hf", f"source={tmp_path / 'run'}", f"target={tmp_path / 'hf'}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.dtype is torch.bfloat16
    assert model.config.eos_token_id == tokenizer.eos_token_id == TOKENIZER.special.eos
    assert tokenizer.model_max_length == YARN.original_length * YARN.factor
    asked = tokenizer("def main():", return_tensors="pt")
    made = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= asked["input_ids"].shape[1] + 3


def test_where_weights_are_found(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    step = run / "checkpoints" / "step-00000000"
    for place in (run, run / "checkpoints", step):
        target = tmp_path / f"of {place.name}"
        assert main(["to_hf", f"source={place}", f"target={target}"]) == 0
        assert (target / "tokenizer.json").read_bytes() == TOKENIZER.json
    with pytest.raises(CheckpointError, match=r"lacks ema/.* and \d+ more"):
        open_weights(run, "ema")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_weights(tmp_path)
    weights = random_weights(M)
    for place in (run, tmp_path / "of run"):
        source = open_weights(place)
        for name, weight in weights.items():
            assert source.read(name).shape == weight.shape
            assert torch.equal(source.read(name).float(), weight.to(source.read(name).dtype).float())


def test_averages_are_exported_where_there_are_some(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    averages = store(tmp_path / "averages", M, random_weights(M, seed=9), kind="ema")
    for place, weights in ((run, "master"), (averages, "ema")):
        words = ["to_hf", f"source={place}", f"weights={weights}", "dtype=fp32", "tokenizer=none"]
        assert main([*words, f"target={tmp_path / weights}"]) == 0
        expected = random_weights(M, seed=9 if weights == "ema" else 5)
        assert torch.equal(open_weights(tmp_path / weights).read("embed"), expected["embed"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sideways"], ["no command 'sideways'", "to_hf from_hf"]),
        (["to_hf"], ["'source' is missing; write source=runs/tiny", "write target=exports/tiny"]),
        (
            ["to_hf", "source=x", "target=.", "dtype=int4", "weights=best", "shard_gigabytes=nan"],
            [
                "target=. exists already",
                "dtype=int4: write one of bf16 fp32 fp8",
                "master ema",
                "shard_gigabytes=nan",
            ],
        ),
        (["from_hf", "source=x", "target=y", "dtype=bf16"], ["there is no key 'dtype'"]),
        (["to_hf", "source=nowhere", "target=y"], ["nowhere holds no checkpoint"]),
        (
            ["from_hf", "source=nowhere", "target=y"],
            ["nowhere/config.json cannot be read: No such file or dir"],
        ),
    ],
)
def test_mistakes(words: list[str], says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    printed = capsys.readouterr().err
    for said in says:
        assert said in printed


def test_mistakes_about_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    words = ["to_hf", f"source={run}", f"target={tmp_path / 'hf'}"]
    text = BUILTIN_TOKENIZER.read_text()
    (run / "tokenizer.json").write_text(text + "\n")
    assert main(words) == 2
    assert "the model was trained with" in capsys.readouterr().err
    (run / "tokenizer.json").unlink()
    assert main(words) == 2
    assert "write tokenizer=FILE, or tokenizer=none" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert main([*words, "tokenizer=none"]) == 0
    assert "there is no tokenizer in it" in capsys.readouterr().out
    assert "eos_token_id" not in config_of(tmp_path / "hf")
    a_run(tmp_path / "small", tiny())
    assert main(["to_hf", f"source={tmp_path / 'small'}", f"target={tmp_path / 'x'}"]) == 2
    assert "has 4096 tokens, the model 96" in capsys.readouterr().err


def test_an_import_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "run")
    assert main(["to_hf", f"source={tmp_path / 'run'}", f"target={tmp_path / 'hf'}"]) == 0
    for shard in (tmp_path / "hf").glob("*.safetensors*"):
        shard.rename(tmp_path / "hf" / f"away-{shard.name}")
    assert main(["from_hf", f"source={tmp_path / 'hf'}", f"target={tmp_path / 'in'}"]) == 2
    assert f"error: {tmp_path / 'hf' / 'model.safetensors'} is missing\n" in capsys.readouterr().err
    for shard in (tmp_path / "hf").glob("away-*"):
        shard.rename(tmp_path / "hf" / shard.name.removeprefix("away-"))
    change_config(tmp_path / "hf", hidden_size=64)
    assert main(["from_hf", f"source={tmp_path / 'hf'}", f"target={tmp_path / 'in'}"]) == 2
    assert "the configuration asks for" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_routing_that_transformers_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "run", replace(M, expert_groups_per_token=1))
    assert main(["to_hf", f"source={tmp_path / 'run'}", f"target={tmp_path / 'hf'}"]) == 0
    assert "scores a group of experts by its best 4, transformers by its best 2" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "noted"), [(124, False), (128, True)])
def test_fp8_that_transformers_misreads(
    tmp_path: Path, rank: int, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keys' matrix has kv_lora_rank + 4 rows: one whole block, or a block and 4 rows."""
    a_run(tmp_path / "run", replace(M, kv_lora_rank=rank))
    assert main(["to_hf", f"source={tmp_path / 'run'}", f"target={tmp_path / 'hf'}", "dtype=fp8"]) == 0
    assert ("asked to dequantise FP8" in capsys.readouterr().out) == noted
