"""``deepseek-train`` whose rank 1 breaks in its experts: ``python -m tests.dist.broken_train [key=value ...]``."""

import os
import sys

from deepseek_train.cli import train, train_rank
from deepseek_train.model.block import MoeBlock
from deepseek_train.phases.parcel import Parcel


class Broken:
    """Computes some experts, then no more."""

    def __init__(self) -> None:
        self.whole, self.left = MoeBlock.compute, 6

    def __call__(self, block: MoeBlock, sent: Parcel) -> Parcel:
        self.left -= 1
        if self.left == 0:
            raise ValueError("the experts broke")
        return self.whole(block, sent)


def rank_main(argv: list[str]) -> int:
    """In place of ``cli.train_rank``'s own, in every rank."""
    if os.environ["RANK"] == "1":
        broken = Broken()
        setattr(MoeBlock, "compute", lambda block, sent: broken(block, sent))  # noqa: B010  (in this process alone)
    return train_rank.rank_main(argv)


if __name__ == "__main__":
    train.RANK = "tests.dist.broken_train"
    sys.exit(train.run(sys.argv[1:]))
