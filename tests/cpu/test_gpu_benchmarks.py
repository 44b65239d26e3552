"""Benchmarks of one GPU, rehearsed: all that needs no GPU to be right."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.moe_work import Layer, bf16_pass, fp8_pass, given
from benchmarks.gpu.report import loss_words, table, write
from benchmarks.gpu.step_race import Limits, Result, race
from benchmarks.gpu.trainer import Entry, Task
from benchmarks.gpu_step import task
from benchmarks.moe_layer import FAR, difference, weights_of
from deepseek_kernels.choice import Kernels
from deepseek_train.config.schema import Fp8Config
from deepseek_train.spec import work

CPU = torch.device("cpu")
LAYER = Layer(hidden=128, inner=128, rows=40, tokens=16, doubles=8)


@pytest.fixture(scope="module")
def small() -> Task:
    return task(rehearse=True, microbatches=2)


@pytest.fixture(scope="module")
def results(small: Task) -> list[Result]:
    limits = Limits(60.0, warm_up=2, counted=2)
    kinds = {"fp8": Fp8Config(), "bf16": None}
    return [race(small, Entry(name, Kernels(), fp8), CPU, limits, False) for name, fp8 in kinds.items()]


def test_entries_train_alike(small: Task, results: list[Result], tmp_path: Path) -> None:
    """The same weights and tokens: losses of FP8 are near those of BF16, not the same, and start at ln V."""
    fp8, bf16 = results
    for r in results:
        assert r.note == ""
        assert r.step_ms is not None
        assert len(r.losses) == 4
        assert r.tflops == pytest.approx(
            small.step_tokens / r.step_ms * 1e3 * work.training(small.model, 32).total / 1e12
        )
        assert r.mfu is None
        assert r.losses[0] == pytest.approx(math.log(small.model.vocab_size), rel=0.02)
    assert fp8.losses != bf16.losses
    assert "within 2%" in loss_words(results)
    write(tmp_path, {"device": "none"}, small, results)
    assert len(json.loads((tmp_path / "gpu_step.json").read_text())["results"]) == 2
    assert f"{bf16.losses[-1]:.4f}" in (tmp_path / "gpu_step.md").read_text()


def test_what_went_wrong_is_said(small: Task, results: list[Result]) -> None:
    fp8, bf16 = results
    far = replace(bf16, losses=tuple(1.03 * loss for loss in bf16.losses))
    assert "NOT within" in loss_words([fp8, far])
    assert "NOT within" in loss_words([fp8, replace(bf16, losses=(float("nan"),) * 4)])
    impossible = Entry("no", Kernels(attention="none"), Fp8Config())
    failed = race(small, impossible, CPU, Limits(0.0), False)
    assert failed.step_ms is None
    assert "there is no backend 'none'" in failed.note
    assert failed.note[:40] in table({}, small, [fp8, failed])


def test_a_layers_rows_are_v3s() -> None:
    assert given(LAYER, CPU).arrivals.rows_E == (40,) * 4
    g = given(LAYER, CPU)
    rows, wanted = g.arrivals.assignment_to_row_A.unique(return_counts=True)
    assert torch.equal(rows, torch.arange(len(g.x_RD)))
    assert wanted.bincount().tolist() == [0, 4 * 40 - 2 * 8, 8]
    v3 = Layer()
    assert v3.flops == 6 * (4 * 8192 + 4096) * 3 * 7168 * 2048
    assert v3.doubles % v3.experts == 0


def test_fp8_and_bf16_compute_the_same_layer() -> None:
    g = given(LAYER, CPU)
    made = []
    for one in (fp8_pass(g, Kernels()), bf16_pass(g, Kernels())):
        result = one()
        gradients = [w.main_grad.clone() for w in weights_of(g)]
        again = one()
        assert difference(again, result) == 0.0
        for w, gradient in zip(weights_of(g), gradients, strict=True):
            assert torch.allclose(w.main_grad, 2 * gradient)
            w.main_grad.zero_()
        made.append((result, gradients))
    (fp8, fp8_gradients), (bf16, bf16_gradients) = made
    assert 0.0 < difference(fp8, bf16) < FAR
    for a, b in zip(fp8_gradients, bf16_gradients, strict=True):
        assert 0.0 < (a - b).norm() / b.norm() < FAR
