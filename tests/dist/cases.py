"""The grid: schedule x pipeline ranks x micro-batches x uneven stages x MTP x expert parallelism."""

from itertools import product

from deepseek_train.schedule.catalog import NAMES, problems
from tests.dist.grid import Case


def fewest(schedule: str, pp: int) -> int:
    """Micro-batches: enough for every schedule to reach its steady state, and no more."""
    return next(m for m in range(pp + 2, 99) if not problems(schedule, pp, m))


# Stages are of uneven cost (five layers on two ranks or four, one without experts). EP2 on DP2: micro-batches differ.
CASES = [
    *(
        Case(schedule, pp, dp=ep, ep=ep, mtp=mtp, microbatches=fewest(schedule, pp), layers=5 + pp // 2)
        for schedule, pp, ep, mtp in product(NAMES, (2, 4), (1, 2), (0, 1))
    ),
    *(Case(schedule, 8, microbatches=fewest(schedule, 8), layers=15) for schedule in NAMES),
    *(
        Case(schedule, 8, dp=2, ep=2, mtp=0, microbatches=fewest(schedule, 8), layers=15)
        for schedule in ("1f1b", "zb_v", "dualpipe")
    ),
    *(Case("auto", pp, dp=ep, ep=ep, microbatches=2 * pp + 2) for pp, ep in ((2, 2), (4, 1), (4, 2))),
    Case("1f1b", 1),
    Case("1f1b", 1, dp=2, ep=2),
    Case("interleaved_1f1b", 1, layers=4, microbatches=3),
    Case("dualpipe_v", 1, layers=4, microbatches=3),
    Case("dualpipe", 2, layers=4, mtp=0, microbatches=6),
    Case("1f1b", 4, layers=4, mtp=2, microbatches=3),  # fewer micro-batches than ranks
    Case("zb_v", 4, layers=7, microbatches=1),
    Case("dualpipe", 2, dp=4, ep=2, layers=3, microbatches=4),  # experts are replicated too
    # No experts in the first stages, no layers in the last, or in neither end; a tied embedding.
    *(
        Case(schedule, 4, dense=2, placed=placed, layers=4, microbatches=8, tied=tied)
        for schedule, placed, tied in (
            ("1f1b", "1|1|2|0", True),
            ("zb_h1", "0|2|2|0", False),
            ("dualpipe", "2|1|1|0", True),
            ("dualpipe", "0|1|3|0", False),
        )
    ),
    Case("zb_v", 2, dense=3, placed="1|2|2|0", layers=5, tied=True, mtp=0),
    Case("dualpipe_v", 2, dp=2, ep=2, dense=3, placed="0|3|1|1", layers=5, tied=True),
    # Experts in two hops: two nodes of two ranks, and of four, beside a pipeline.
    *(
        Case(schedule, 2, dp=4, ep=4, microbatches=fewest(schedule, 2), node=2)
        for schedule in ("1f1b", "zb_v")
    ),
    Case("dualpipe", 2, dp=4, ep=4, microbatches=4, node=2, recompute=("block",)),
    Case("dualpipe", 2, dp=8, ep=8, microbatches=4, node=4),
    # Experts shared by mirrored pipeline ranks; on nodes of 2, each of another pipeline rank.
    Case("dualpipe", 2, dp=1, ep=2, layers=3, mtp=0, microbatches=4, mirrored=True),
    Case("dualpipe", 2, dp=2, ep=4, layers=3, microbatches=6, mirrored=True),
    Case("dualpipe", 2, dp=2, ep=4, layers=3, microbatches=6, mirrored=True, node=2),
    Case("dualpipe", 2, dp=2, ep=2, layers=3, mtp=0, microbatches=4, mirrored=True),  # replicated too
    Case("dualpipe", 4, dp=1, ep=2, mtp=0, microbatches=10, mirrored=True, recompute=("block",)),
    Case("dualpipe", 4, dp=2, ep=4, microbatches=8, mirrored=True),
]
