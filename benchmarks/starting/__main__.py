"""The light half; the ranks' is ``rank``."""

import sys
import time
from typing import Any

from benchmarks.starting.note import note
from deepseek_train.cli import train
from deepseek_train.cli.launch_local import launch


def noted(*args: Any, **kwargs: Any) -> int:
    note("light half", time.process_time())
    return launch(*args, **kwargs)


if __name__ == "__main__":
    train.RANK = "benchmarks.starting.rank"
    setattr(train, "launch", noted)  # noqa: B010
    sys.exit(train.run(sys.argv[1:]))
