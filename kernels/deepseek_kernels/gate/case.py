"""What the gate compiles, and what it holds the machine code to."""

from dataclasses import dataclass, field
from typing import Any

MOST_SHARED = 232_448  # bytes a block may have on Hopper


@dataclass(frozen=True)
class Limits:
    """Spills and stack are zero always. ``needs``: instructions (or prefixes of them) that must occur at least so
    often in
    the machine code; ``most``: those that may not occur more often; ``forbids``: those that must not at all."""

    registers: int
    shared: int = MOST_SHARED
    needs: dict[str, int] = field(default_factory=dict)
    forbids: tuple[str, ...] = ()
    most: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched. ``signature``: Triton types of the run-time arguments ("*bf16", "i32",
    "tensordesc<fp8e4nv[128,128]>"); ``constants``: the constexprs; ``aligned``: arguments divisible by 16, as the
    launch would find them."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    launch: dict[str, int]
    aligned: tuple[str, ...]
    limits: Limits
