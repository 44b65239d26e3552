"""TFLOP/s and MFU against hand arithmetic, and the model that is sized for one GPU."""

import pytest

from deepseek_train.spec import work
from deepseek_train.spec.throughput import Throughput, known_peak
from deepseek_train.spec.weights import all_weights, count_parameters
from tests.paper.models import shipped


def test_v3_with_its_mtp_module() -> None:
    """By hand: 250.46 GFLOP a token of the main model (test_work), and an MTP module of one MoE layer, a join of
    [D, 2D] and the head."""
    m = shipped("deepseek_v3")
    per_layer = 187_105_280 + 9 * 3 * 7168 * 2048 + 256 * 7168  # attention, 8 + 1 experts, router
    module = (
        6 * (per_layer + 2 * 7168**2 + 129280 * 7168) + 3 * 128 * (192 + 128) * 4097 + 7168
    )  # the embedding
    assert work.training(m, 4096).total - work.model(m, 4096).total == module
    assert work.training(m, 4096).total == pytest.approx(260.65e9, rel=1e-4)


def test_papers_own_speed() -> None:
    """V3 report, table 1: 180,000 H800 hours for a trillion tokens. That is 1543 tokens a second and GPU, 402 TFLOP/s,
    41% of the peak."""
    count = Throughput(work.training(shipped("deepseek_v3"), 4096).total, known_peak("NVIDIA H800"))
    tflops = count.tflops(2048 * 1e12 / (180_000 * 3600), 2048)
    assert tflops == pytest.approx(402.2, abs=0.1)
    assert count.mfu(tflops) == pytest.approx(402.2 / 989.4, abs=1e-4)
    assert Throughput(1, None).mfu(tflops) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200-NVL", None),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA GH100X", None),
    ],
)
def test_peaks_that_are_known(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_the_proxy_has_v3s_layers_and_fits_one_gpu() -> None:
    """Its layers take V3's operations but for the router's; 16 bytes a parameter leave 20 GB of 60 to activations."""
    v3, proxy = shipped("deepseek_v3"), shipped("h100_proxy")
    assert work.layer(proxy, 0, 4096) == work.layer(v3, 0, 4096)
    router = 6 * (256 - 16) * 7168
    assert work.layer(v3, 3, 4096).total - work.layer(proxy, 1, 4096).total == router
    assert count_parameters(all_weights(proxy)) * 16 < 42e9
    shares = [work.head(m).total / work.training(m, 4096).total for m in (v3, proxy)]
    assert shares[1] == pytest.approx(shares[0], abs=0.01)
