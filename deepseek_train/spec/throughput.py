"""What tokens per second come to: operations per second of one GPU, and their share of what it could do (MFU).

Operations are those of ``work``, the causal count: what the model asks for, never what recomputation or padding adds.
"""

from dataclasses import dataclass

# BF16 tensor cores without sparsity, of the SXM boards (NVIDIA's data sheets; the H800 computes like the H100). FP8
# training is measured against the same number, as papers do.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "H800": 989.4}
_SLOWER = ("PCIe", "NVL")  # boards with the same names and lower clocks


def known_peak(device_name: str) -> float | None:
    """Peak TFLOP/s of a GPU by the name that its driver gives; None: not in the table."""
    words = device_name.replace("-", " ").split()
    if any(word in words for word in _SLOWER):
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), None)


@dataclass(frozen=True)
class Throughput:
    """How speed is counted. ``peak_tflops`` of one GPU; None: unknown, or ranks compute on CPUs."""

    flops_per_token: int
    peak_tflops: float | None

    def tflops(self, tokens_per_second: float, ranks: int) -> float:
        """TFLOP/s of one rank, when all ``ranks`` together train that many tokens."""
        return tokens_per_second * self.flops_per_token / ranks / 1e12

    def mfu(self, tflops: float) -> float | None:
        """``tflops`` over the peak."""
        return None if self.peak_tflops is None else tflops / self.peak_tflops
