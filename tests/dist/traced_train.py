"""``deepseek-train`` whose ``torch.compile`` needs no C++: ``python -m tests.dist.traced_train [key=value ...]``."""

import sys
from functools import partial

import torch

from deepseek_train.cli import train, train_rank


def rank_main(argv: list[str]) -> int:
    """In place of ``cli.train_rank``'s own."""
    setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # noqa: B010
    return train_rank.rank_main(argv)


if __name__ == "__main__":
    train.RANK = "tests.dist.traced_train"
    sys.exit(train.run(sys.argv[1:]))
