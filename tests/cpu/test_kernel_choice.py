"""Backends are chosen once, by name or by device; one that cannot be had is refused with what there is."""

import doctest
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deepseek_kernels
from deepseek_kernels import choice, machine
from deepseek_kernels.choice import FAMILIES, ON_CPU, Kernels, available, choose
from deepseek_kernels.machine import BackendUnavailable
from deepseek_train.cli.compose import compose_config
from deepseek_train.config.parse import ConfigError
from deepseek_train.train.kernel_plan import kernel_problems, plan_kernels
from deepseek_train.train.observer import linears_of
from deepseek_train.train.preflight import preflight


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU and Triton."""
    monkeypatch.setattr(choice, "why_not", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "on_hopper", lambda: True)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels are not interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    machine.why_not.cache_clear()
    monkeypatch.setattr(choice, "why_not", machine.why_not.__wrapped__)


def test_auto_is_plain_torch_on_cpus_and_triton_on_gpus(on_gpu: None) -> None:
    assert choose("cpu", {}) == choose("cpu", dict.fromkeys(FAMILIES, "auto")) == ON_CPU
    found = choose("cuda", {})
    assert (found.gemm, found.grouped_gemm, found.attention) == ("cuda", "cuda", "torch")
    assert (found.quant, found.swiglu, found.wgrad) == ("cuda", "cuda", "torch")
    others = set(FAMILIES) - {"quant", "gemm", "grouped_gemm", "swiglu", "attention", "wgrad"}
    assert {getattr(found, family) for family in others} == {"triton"}


def test_auto_takes_the_next_where_the_first_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_not", lambda backend: "no nvcc" if backend == "cuda" else None)
    found = choose("cuda", {})
    assert (found.gemm, found.grouped_gemm, found.quant, found.swiglu) == (
        "torch",
        "triton",
        "triton",
        "triton",
    )


def test_a_name_is_taken_as_it_is(on_gpu: None) -> None:
    found = choose("cuda", {"gemm": "torch", "quant": "reference"})
    assert (found.gemm, found.quant, found.norm) == ("torch", "reference", "triton")
    assert (
        str(found)
        == "triton, but quant reference, gemm torch, grouped_gemm cuda, swiglu cuda, attention torch, wgrad torch"
    )
    assert str(Kernels()) == "reference"


def test_the_interpreter_runs_triton_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "why_not", lambda backend: None)
    assert choose("cpu", {"quant": "triton"}) == replace(ON_CPU, quant="triton")


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("quant", "triton", "on the CPU"),
        ("gemm", "torch", "tensors are on the CPU"),
        ("gemm", "cuda", "tensors are on the CPU"),
        ("swiglu", "cuda", "tensors are on the CPU"),
        ("norm", "cuda", "no backend 'cuda' for norm"),
        ("loss", "fastest", "no backend 'fastest' for loss"),
    ],
)
def test_what_cannot_be_had_is_refused(family: str, name: str, said: str, compiled: None) -> None:
    with pytest.raises(BackendUnavailable) as error:
        choose("cpu", {family: name})
    assert said in str(error.value)
    assert f"{family}: " in str(error.value)
    assert "Use reference" in str(error.value)
    assert name not in available("cpu", family)


def test_a_launch_is_told_of_every_family_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose_config(
        ["experiment=tiny", "cluster.device=cpu", "kernels.quant=triton", "kernels.moe=mine"]
    )
    found = preflight(config, None)
    assert [p.where for p in found] == ["kernels.quant", "kernels.moe"]
    assert [p.mend for p in found] == [
        "On this machine there are: auto, reference.",
        "On this machine there are: auto, reference, torch.",
    ]
    assert kernel_problems(compose_config(["experiment=tiny", "precision=fp8"]), "cpu") == []
    assert plan_kernels(compose_config(["experiment=tiny"]), "cpu") == ON_CPU


def test_a_wrong_recipe_does_not_hide_a_wrong_kernel(compiled: None) -> None:
    asked = ["experiment=tiny", "precision=fp8", "precision.fp8.weights.tile=1x128", "kernels.gemm=tritn"]
    found = preflight(compose_config([*asked, "cluster.device=cpu"]), None)
    assert [p.where for p in found] == ["precision.fp8.weights.tile", "kernels.gemm"]


def test_what_anybody_interprets_is_exact() -> None:
    """With TRITON_INTERPRET=1, as messages recommend, and nothing else: the stock interpreter gives 64 and 384."""
    script = """
import torch
from deepseek_kernels.quant import quantise_rows
x = torch.zeros(2, 128, dtype=torch.bfloat16)
x[0, 0], x[0, 1], x[0, 2], x[1, 0] = 448.0, 127.0, 31.5, torch.nan
print(quantise_rows(x, pow2=False, backend="triton").values.float()[[0, 0, 1], [1, 2, 0]].tolist())
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[128.0, 32.0, nan]"


def test_the_example_of_the_package_runs() -> None:
    done = doctest.testmod(deepseek_kernels)
    assert (done.attempted, done.failed) == (11, 0)


def test_a_run_says_where_its_recipe_is_not_v3s() -> None:
    asked = ["experiment=tiny", "precision=fp8"]
    assert linears_of(compose_config(["experiment=tiny", "precision=bf16"])) == "BF16"
    assert linears_of(compose_config(asked)) == "FP8 (V3's recipe), all else in BF16"
    others = ["precision.fp8.activations.scale=pow2", "precision.fp8.accumulate=hopper"]
    expected = "FP8 (V3's recipe, but activations 1x128 pow2, accumulate hopper), all else in BF16"
    assert linears_of(compose_config([*asked, *others])) == expected


def test_the_gate_says_which_families_there_are() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "deepseek_kernels.gate", "moee"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no family moee: write attention gemm" in done.stderr


def test_emulated_accumulation_wants_the_reference(on_gpu: None) -> None:
    asked = ["experiment=tiny", "precision=fp8", "precision.fp8.accumulate=hopper"]
    (found,) = kernel_problems(compose_config(asked), "cuda")
    assert found.where == "precision.fp8.accumulate"
    references = ["kernels.gemm=reference", "kernels.grouped_gemm=reference"]
    assert kernel_problems(compose_config([*asked, *references]), "cuda") == []
    assert kernel_problems(compose_config(asked), "cpu") == []


def test_attention_that_cudnn_cannot_do_is_tritons(on_gpu: None) -> None:
    tiny = compose_config(["experiment=tiny"])  # FP32
    assert plan_kernels(tiny, "cuda").attention == "triton"
    (found,) = kernel_problems(compose_config(["experiment=tiny", "kernels.attention=torch"]), "cuda")
    assert (found.where, "precision.params is fp32" in found.what) == ("kernels.attention", True)
    assert plan_kernels(compose_config(["experiment=tiny", "precision=bf16"]), "cuda").attention == "torch"


def test_the_recipe_can_be_changed_by_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fp8 = compose_config(["precision=fp8", "precision.fp8.gradients.tile=128x128"]).precision.fp8
    assert fp8 is not None
    assert (fp8.gradients.tile, fp8.gradients.scale, fp8.expert_inputs.scale) == ("128x128", "fp32", "pow2")
    assert compose_config(["precision=bf16"]).precision.fp8 is None
    with pytest.raises(ConfigError, match=r"Did you mean 'precision\.fp8\.gradients\.tile'"):
        compose_config(["precision=fp8", "precision.fp8.gradient.tile=128x128"])
    (found,) = preflight(
        compose_config(["experiment=tiny", "precision=fp8", "precision.fp8.weights.tile=1x128"]), None
    )
    assert found.where == "precision.fp8.weights.tile"


def test_the_defaults_are_the_yaml() -> None:
    """V3's recipe stands in one file to read; in code it is the default."""
    written, default = (compose_config([p]).precision.fp8 for p in ("precision=fp8", "+precision.fp8={}"))
    assert written == default
