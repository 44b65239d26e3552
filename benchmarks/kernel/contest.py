"""What is raced: one piece of work, everybody who can do it, and the least it could take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepseek_kernels.machine import why_not


@dataclass(frozen=True)
class Contest:
    """``work``: the fewest bytes that have to move through memory (each input read once, each output written once), or
    the operations of the matrix units. ``entries``: a call for each contestant, ours by the name of the backend; a
    name in parentheses is an alternative that users have today."""

    op: str
    shape: str
    bound: Literal["memory", "bf16", "fp8"]
    work: int
    entries: dict[str, Callable[[], object]]


def there(*names: str) -> list[str]:
    """The backends of these that can run here."""
    return [name for name in names if why_not(name) is None]


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: a device-to-device copy (bytes read plus written) and large products by cuBLAS."""

    bytes_per_second: float
    bf16_flops: float
    fp8_flops: float  # cuBLAS with one scale a matrix, fast accumulation: the fastest FP8 product there is

    def floor_ms(self, contest: Contest) -> float:
        rate = {
            "memory": self.bytes_per_second,
            "bf16": self.bf16_flops,
            "fp8": self.fp8_flops,
        }[contest.bound]
        return contest.work / rate * 1e3


@dataclass(frozen=True)
class Result:
    op: str
    shape: str
    bound: str
    entry: str
    ms: float | None  # median; None: it could not run
    floor_ms: float
    rate: float | None  # GB/s or TFLOP/s
    of_ceiling: float | None  # floor / time
    of_copy: float | None = None  # time of a copy that moves as many bytes / time, where memory is the bound
    note: str = ""
