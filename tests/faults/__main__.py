"""``python -m tests.faults``: ``deepseek-train`` with faults, see the injector; light, like the command itself."""

import sys

from deepseek_train.cli import train

if __name__ == "__main__":
    train.RANK = "tests.faults.injector"
    sys.exit(train.run(sys.argv[1:]))
