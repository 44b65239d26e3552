"""What every multi-rank test uses: ``results = run_ranks(fn, world_size, *args)``."""

from tests.harness.report import RanksFailed
from tests.harness.runner import run_ranks

__all__ = ["RanksFailed", "run_ranks"]
