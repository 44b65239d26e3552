"""For every test: fresh memory is NaN, and randomness repeats (seeded from the test's own name)."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.poison import poison_empty, seed_everything

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Machines are shared: how long an example takes, to run or to be made, says nothing.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do look into ``tests/dist``: pytest takes a folder of that name for a build's output and skips it."""
    return False if collection_path == Path(__file__).parent / "dist" else None


@pytest.fixture(autouse=True)
def nan_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison ``torch.empty`` and seed the generators, where torch is in use at all (ranks do the same)."""
    torch = sys.modules.get("torch")
    seed_everything(torch, request.node.nodeid)
    if torch is not None:
        poison_empty(torch, monkeypatch.setattr)
