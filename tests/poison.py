"""Fresh memory that is never zero by luck: ``torch.empty`` and its kin return NaN.

Knows torch only as an argument, so that the tests of the paper floors need not import it.
"""

import functools
import random
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

Setter = Callable[[object, str, object], None]  # what ``setattr`` and ``monkeypatch.setattr`` have in common


def poison_empty(torch: ModuleType, set_attribute: Setter = setattr) -> None:
    """Make uninitialised floating point memory NaN. Integers are left as they come."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        set_attribute(owner, name, _poisoned(torch, getattr(owner, name)))


def _poisoned(torch: ModuleType, allocate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def allocate_nan(*args: Any, **kwargs: Any) -> Any:
        fresh = allocate(*args, **kwargs)
        if fresh.is_floating_point() or fresh.is_complex():
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return allocate_nan


def seed_everything(torch: ModuleType | None, name: str, rank: int = 0) -> None:
    """Seed Python's and torch's generators from a test's name; ranks get seeds of their own."""
    seed = zlib.crc32(name.encode()) + rank
    random.seed(seed)
    if torch is not None:
        torch.manual_seed(seed)
