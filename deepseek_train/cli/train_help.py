"""What ``deepseek-train --help`` tells: how it is called, which experiments there are, where a run goes, exit codes."""

import textwrap
from pathlib import Path

from deepseek_train.cli.compose import CONFIG_DIR
from deepseek_train.config.exit_codes import MEANING

SHORT = """usage: deepseek-train experiment=NAME [key=value ...] [--cfg]

  deepseek-train experiment=tiny parallel.pp=2 parallel.ep=2      start local ranks and train
  torchrun --nproc-per-node 4 -m deepseek_train.cli.train ...     join torchrun's ranks
  deepseek-train experiment=tiny --cfg                            print the whole resolved configuration: every key
"""
_KEYS = """Each key of the configuration can be given; without an experiment they are those of configs/config.yaml.

  name=NAME               of the run, else the experiment's. It goes to runs/NAME: report.md, metrics.jsonl,
                          checkpoints/, config.yaml; run_dir=FOLDER puts it elsewhere, checkpoint.path=PLACE its
                          checkpoints, a folder or a URL
  resume=auto             go on from the run's newest whole checkpoint if there is one, in whatever layout; must: only
                          go on; never: begin anew, the old run is moved aside
  init_from=PLACE         a new run that begins with the weights of another run, of a checkpoint, or of a folder that
                          deepseek-convert from_hf has made
  Ctrl-C                  finishes the step, saves and leaves; the same command goes on
"""
_WIDTH = 119


def full_help() -> str:
    """All of it."""
    codes = [f"  {code.value:<4}{words}" for code, words in MEANING.items()]
    signals = (
        "  128 and a signal's number: ended by it, as 130 where Ctrl-C came twice; nothing more was saved"
    )
    return "\n".join([SHORT, _KEYS, "experiments:", *_experiments(), "", "exit codes:", *codes, signals])


def _experiments() -> list[str]:
    """Each with the first sentence of its file."""
    lines = []
    for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml")):
        first = f"  {path.stem:<16}"
        lines += textwrap.wrap(
            _first_sentence(path), _WIDTH, initial_indent=first, subsequent_indent=" " * len(first)
        )
    return lines


def _first_sentence(path: Path) -> str:
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            comments.append(line.lstrip("# "))
    return " ".join(comments).split(". ")[0].rstrip(".") + "."
