"""``deepseek-data``: prepare, check and look at training data.

usage: deepseek-data COMMAND ...

  prepare data.path=DIR [data.KEY=VALUE ...]
      Turn text into token shards in DIR. What is there already with the same settings is kept.
        data.source=builtin          or builtin:numpy+torch (some of its packages), or a file, folder or URL of
                                     .txt .md .py .jsonl (each also .gz .zst)
        data.tokenizer=builtin       or the path of a tokenizer.json
        data.max_megabytes=null      at most this much text, spread over packages or folders
        data.fim_rate=0.1            share of documents rearranged as prefix-suffix-middle
        data.validation_percent=5    share of files held out
  verify DIR
      Check every file against the manifest: sizes, checksums, token ids.
  show DIR [K] [split=train] [sequence_length=512] [seed=0]
      Print what DIR holds, and sample number K (default 0) as text.
  tokenizer output=FILE [source=builtin] [vocab_size=4096] [max_megabytes=null]
      Train a byte-level BPE tokenizer, DeepSeek's way; the same text gives the same bytes.

examples:
  deepseek-data prepare data.path=datasets/builtin data.max_megabytes=24
  deepseek-data prepare data.path=datasets/mine data.source=texts data.validation_percent=10
  deepseek-data show datasets/mine 7 sequence_length=128

exit codes: 0 done; 2 something is wrong with the arguments or the data, and the message says what.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from deepseek_train.cli.answer import INTERRUPTED
from deepseek_train.cli.key_value import UsageError, like, parse_key_values
from deepseek_train.config.schema import DataConfig
from deepseek_train.data.corpus import open_corpus
from deepseek_train.data.errors import DataError
from deepseek_train.data.loader import TokenSource
from deepseek_train.data.manifest import TOKENIZER_FILE, Manifest, read_manifest
from deepseek_train.data.prepare import prepare, settings_problems
from deepseek_train.data.tokenizer import load_tokenizer, train_tokenizer
from deepseek_train.data.verify import verify


@dataclass(frozen=True)
class ShowRequest:
    """Keys of ``deepseek-data show``."""

    split: str = "train"
    sequence_length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class TokenizerRequest:
    """Keys of ``deepseek-data tokenizer``."""

    output: str = like("tokenizer.json")
    source: str = "builtin"
    vocab_size: int = 4096
    max_megabytes: int | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. ``arguments`` defaults to the command line."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help") or "--help" in rest or "-h" in rest:
        print(__doc__)
        return 0
    commands: dict[str, Callable[[list[str]], None]] = {
        "prepare": _prepare,
        "verify": _verify,
        "show": _show,
        "tokenizer": _tokenizer,
    }
    try:
        if command not in commands:
            raise UsageError([f"there is no command '{command}'; the commands are: {' '.join(commands)}"])
        commands[command](rest)
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        print("'deepseek-data --help' shows what can be written.", file=sys.stderr)
        return 2
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndeepseek-data: stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def _prepare(arguments: list[str]) -> None:
    config = parse_key_values(DataConfig, arguments, settings_problems, prefix="data.")
    begun = time.monotonic()
    manifest = prepare(config, progress=True)
    print(_summary(config.path, manifest))
    print(f"ready after {time.monotonic() - begun:.1f} s")


def _verify(arguments: list[str]) -> None:
    folder = _folder(arguments[:1], arguments[1:])
    manifest = read_manifest(folder)
    problems = verify(folder, manifest)
    for problem in problems[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise problems[-1]
    print(_summary(str(folder), manifest))
    print("all files are as the manifest says")


def _show(arguments: list[str]) -> None:
    positional = [argument for argument in arguments if "=" not in argument]
    folder = _folder(positional[:1], positional[2:])
    number = positional[1] if len(positional) > 1 else "0"
    if not number.isdecimal():
        raise UsageError([f"'{number}' is not the number of a sample: write 0, 1, 2, .."])
    request = parse_key_values(
        ShowRequest, [argument for argument in arguments if "=" in argument], _show_problems
    )
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(str(folder / TOKENIZER_FILE))
    split = cast(Literal["train", "validation"], request.split)
    source = TokenSource(str(folder), split, request.sequence_length, 0, request.seed, tokenizer.vocab_size)
    print(_summary(str(folder), manifest))
    print(f"sample {number} of {split}, {source.num_sequences} samples an epoch:\n")
    print(tokenizer.decode(source.sequences([int(number)])[0].tolist()))


def _show_problems(request: ShowRequest) -> list[str]:
    problems = []
    if request.split not in ("train", "validation"):
        problems.append(f"split={request.split}: write split=train or split=validation")
    if request.sequence_length < 1:
        problems.append(f"sequence_length={request.sequence_length}: not a positive number of tokens")
    return problems


def _tokenizer_problems(request: TokenizerRequest) -> list[str]:
    if request.max_megabytes is not None and request.max_megabytes < 1:
        return [f"max_megabytes={request.max_megabytes}: not a positive number, nor null for all"]
    return []


def _tokenizer(arguments: list[str]) -> None:
    request = parse_key_values(TokenizerRequest, arguments, _tokenizer_problems)
    begun = time.monotonic()
    tokenizer = train_tokenizer(open_corpus(request.source, request.max_megabytes), request.vocab_size)
    output = Path(request.output)
    unfinished = output.with_name(output.name + ".unfinished")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_bytes(tokenizer.json)
    os.replace(unfinished, output)
    print(f"{output}: {tokenizer.vocab_size} tokens after {time.monotonic() - begun:.1f} s")
    print(f"  sha256 {tokenizer.sha256}")


def _folder(first: list[str], more: list[str]) -> Path:
    problems = [] if first else ["the folder of prepared tokens is missing"]
    problems += [f"'{argument}' is one argument too many" for argument in more]
    if problems:
        raise UsageError(problems)
    return Path(first[0])


def _summary(path: str, manifest: Manifest) -> str:
    tokens = manifest.tokens("train") + manifest.tokens("validation")
    lines = [
        f"{path}: {manifest.text_bytes / 1e6:.1f} MB of text from {manifest.settings.source}",
        *(
            f"  {split:<11}{manifest.tokens(split):>14,} tokens in {manifest.documents(split):,} documents"
            for split in ("train", "validation")
        ),
        f"  {manifest.text_bytes / tokens:.2f} bytes a token, vocabulary {manifest.vocab_size}, "
        f"FIM rate {manifest.settings.fim_rate}, content {manifest.content_hash()}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
