"""``deepseek-checkpoint``: which checkpoints there are, whether they are whole; other files, fewer of them.

usage: deepseek-checkpoint ls PLACE
       deepseek-checkpoint verify PLACE
       deepseek-checkpoint reshard source=CHECKPOINT target=PLACE [files=1]
       deepseek-checkpoint prune PLACE [last=2] [every=0] [best=0] [bad=false] [dry=true]

PLACE is a run folder, a folder of checkpoints or one checkpoint; a path or an fsspec URL (s3://bucket/run).

  ls        a line for each: step, tokens, layout that wrote it, files, size, validation loss; damaged ones that a run
            has set aside too. Reads manifests only.
  verify    reads every file and compares it with its checksum
  reshard   the same tensors, bit for bit, in another number of files. Not needed to change a run's layout: every
            layout reads every checkpoint.
  prune     deletes all but the newest ``last``, multiples of ``every`` steps and the ``best`` by validation loss; with
            bad=true also what was set aside. Says what it would do; dry=false does it. What is to be kept is read
            first: a damaged one is named, and stays, and does not count.

exit codes: 0 done, all is well; 1 something is damaged, and the message names the file; 2 something is wrong with the
arguments; 3 there is no checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import Progress
from upath import UPath

from deepseek_train.checkpoint.errors import CheckpointError, NoCheckpoint
from deepseek_train.checkpoint.files import rewrite
from deepseek_train.checkpoint.finder import candidates, checkpoints_at
from deepseek_train.checkpoint.folders import Found, layout_words, set_aside_in
from deepseek_train.checkpoint.manifest import read_manifest, verify
from deepseek_train.checkpoint.places import Place, is_there
from deepseek_train.checkpoint.retention import Retention, discard, to_go_of_whole
from deepseek_train.checkpoint.stored import newest_whole
from deepseek_train.cli.answer import answer
from deepseek_train.cli.key_value import UsageError, like, parse_key_values
from deepseek_train.monitor import numbers


@dataclass(frozen=True)
class Reshard:
    source: str = like("runs/tiny")
    target: str = like("moved")
    files: int = 1


@dataclass(frozen=True)
class Prune:
    last: int = 2
    every: int = 0
    best: int = 0
    bad: str = "false"
    dry: str = "true"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code. ``arguments`` defaults to the command line."""
    try:
        return answer("deepseek-checkpoint", __doc__, sys.argv[1:] if arguments is None else arguments, _say)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 3 if isinstance(error, NoCheckpoint) else 1


def _say(words: Sequence[str]) -> None:
    what, *rest = words
    match what:
        case "ls":
            _list(_one(rest))
        case "verify":
            _verify(_one(rest))
        case "reshard":
            asked = parse_key_values(Reshard, rest, _wrong_reshard)
            print(rewrite(newest_whole(_opened(asked.source)), _opened(asked.target), asked.files))
        case "prune":
            place = [word for word in rest if "=" not in word]
            asked_prune = parse_key_values(Prune, [word for word in rest if "=" in word], _wrong_prune)
            _prune(_one(place), asked_prune)
        case _:
            raise UsageError([f"'{what}' is not one of ls, verify, reshard, prune"])


def _list(place: Place) -> None:
    try:
        _list_whole(candidates(place))
    finally:  # also where nothing else is left
        for path in set_aside_in(checkpoints_at(place)):
            why = path / "why-bad.txt"
            print(f"damaged  {path}: {why.read_text().strip() if is_there(why) else 'no reason is given'}")


def _list_whole(found: Sequence[Found]) -> None:
    for one in found:
        files = read_manifest(one.path).files
        size = sum(record.bytes for record in files.values())
        loss = one.facts.get("validation_loss")
        words = [
            f"step {one.step}",
            f"{numbers.count(one.facts['tokens'])} tokens" if "tokens" in one.facts else "",
            layout_words(one.facts),
            f"{sum(name.endswith('.safetensors') for name in files)} files, {numbers.data_size(size)}",
            f"validation loss {loss:.4f}" if loss is not None else "",
            str(one.path),
        ]
        print("  ".join(word for word in words if word))


def _verify(place: Place) -> None:
    """Every file of every checkpoint; all that is damaged is told before the verdict."""
    damaged: list[str] = []
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        for one in candidates(place):
            if said := _damage(one, progress):
                damaged += said
            else:
                files = read_manifest(one.path).files
                size = sum(record.bytes for record in files.values())
                print(f"{one.path}: {len(files)} files, {numbers.data_size(size)}, all as the manifest says")
    if damaged:
        raise CheckpointError("\n".join(damaged))


def _damage(found: Found, progress: Progress) -> list[str]:
    """What is wrong with which files; all are read."""
    damaged = []
    for name, record in progress.track(read_manifest(found.path).files.items(), description=found.path.name):
        try:
            verify(found.path, name, record)
        except CheckpointError as error:
            damaged.append(str(error))
    return damaged


def _prune(place: Place, asked: Prune) -> None:
    bad = set_aside_in(checkpoints_at(place)) if asked.bad == "true" else []
    try:
        found = candidates(place)
    except NoCheckpoint:
        _delete(bad, asked)
        raise
    retention = Retention(asked.last, asked.every, asked.best)
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        going, damaged = to_go_of_whole(found, retention, lambda one: _damage(one, progress))
    _delete([*(one.path for one in going), *bad], asked)
    if damaged:
        raise CheckpointError("\n".join([*damaged, "These stay, and do not count as kept."]))


def _delete(going: Sequence[Place], asked: Prune) -> None:
    for path in going:
        if asked.dry == "false":
            discard(path)
        print(f"{'deleted' if asked.dry == 'false' else 'would delete'} {path}")
    if not going:
        print("nothing to delete")
    elif asked.dry == "true":
        print("dry=false deletes them")


def _one(words: Sequence[str]) -> Place:
    if len(words) != 1:
        raise UsageError([f"one place is needed, {len(words)} are given; write a run's folder, as runs/tiny"])
    return _opened(words[0])


def _opened(words: str) -> Place:
    try:
        place = UPath(words)
        place.fs  # noqa: B018  asked for here: only now does fsspec look for the package that this URL needs
    except (ImportError, ValueError) as error:
        raise UsageError([f"{words} cannot be opened: {error}"]) from error
    return place


def _wrong_reshard(asked: Reshard) -> list[str]:
    return [f"files={asked.files}: write 1 or more"] if asked.files < 1 else []


def _wrong_prune(asked: Prune) -> list[str]:
    wrong = [f"last={asked.last}: the newest always stays, write 1 or more"] if asked.last < 1 else []
    counts = (("every", asked.every), ("best", asked.best))
    wrong += [f"{key}={value}: write 0 or more" for key, value in counts if value < 0]
    flags = (("bad", asked.bad), ("dry", asked.dry))
    return wrong + [
        f"{key}={text}: write true or false" for key, text in flags if text not in ("true", "false")
    ]


if __name__ == "__main__":
    sys.exit(main())
