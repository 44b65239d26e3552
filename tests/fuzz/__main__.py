"""``python -m tests.fuzz [--inputs 200000]``: atheris on every reader, each in a process of its own.

Needs ``pip install atheris``. Ends with 1 at the first finding, and libFuzzer says which input it was.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["deepseek_train"]):
    from tests.fuzz.targets import TARGETS, seeds


def fuzz(name: str, inputs: int) -> None:
    """Runs one target in this process, which libFuzzer then ends."""
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "seed").write_bytes(seeds()[name])
        atheris.Setup(["fuzz", f"-runs={inputs}", "-max_len=4096", "-verbosity=0", corpus], TARGETS[name])
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000, help="for each reader")
    parser.add_argument("--target", choices=sorted(TARGETS))
    args = parser.parse_args()
    if args.target:
        fuzz(args.target, args.inputs)
        return 0
    for name in TARGETS:
        code = subprocess.call(
            [sys.executable, "-m", "tests.fuzz", "--target", name, "--inputs", str(args.inputs)]
        )
        print(f"{name}: {args.inputs} inputs, {'a finding' if code else 'nothing found'}", flush=True)
        if code:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
