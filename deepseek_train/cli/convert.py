"""``deepseek-convert``: weights to Hugging Face's layout and from it. Needs no GPU, and memory for one weight alone.

usage: deepseek-convert to_hf source=FOLDER target=FOLDER [key=value ...]
       deepseek-convert from_hf source=FOLDER target=FOLDER [key=value ...]

to_hf writes safetensors as DeepSeek publishes its models (one tensor per matrix and expert, MTP modules as further
layers), config.json and the tokenizer. transformers loads the folder, without code of its own; vLLM and SGLang go by
the same names (not tried).
  source=runs/tiny        a run (its newest checkpoint), a checkpoint, or a folder in Hugging Face's layout
  target=exports/tiny     a folder that does not exist
  dtype=bf16              or fp32; or fp8: attention, feed-forward networks and experts in E4M3 with a scale for every
                          128x128 block, as DeepSeek-V3 is published, quantised from FP32 masters
  weights=master          or ema: their running averages, where the run kept them
  tokenizer=auto          the one beside the source; or the path of a tokenizer.json; or none
  shard_gigabytes=4       size of a file, at most

from_hf reads such a folder, from here or elsewhere (BF16, FP32, FP16, or FP8 in blocks), as a checkpoint with FP32
masters. Nothing in the folder is run; everything in it is checked first.
  source=exports/tiny     the folder
  target=runs/mine        a folder that does not exist; gets checkpoints/step-00000000 and tokenizer.json
  tokenizer=auto          as above

What goes out, comes in and goes out again is the same to the last bit, in each dtype.

exit codes: 0 done; 2 something is wrong with the arguments or the folders, and the message says what.
"""

import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from upath import UPath

from deepseek_kernels.formats import TILE
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.folders import CHECKPOINTS
from deepseek_train.checkpoint.hf_config import context_length
from deepseek_train.checkpoint.hf_export import HfType, export, export_bytes
from deepseek_train.checkpoint.hf_folder import HfFolder
from deepseek_train.checkpoint.hf_import import import_bytes, import_hf
from deepseek_train.checkpoint.hf_tokenizer import TOKENIZER, token_ids, tokenizer_files
from deepseek_train.checkpoint.weight_source import CheckpointWeights, open_weights
from deepseek_train.cli.answer import answer
from deepseek_train.cli.convert_request import (
    FromHf,
    ToHf,
    check_same,
    find_tokenizer,
    target_problems,
    to_hf_problems,
)
from deepseek_train.cli.key_value import UsageError, parse_key_values
from deepseek_train.config.schema import ModelConfig
from deepseek_train.data.errors import DataError
from deepseek_train.data.tokenizer import TextTokenizer
from deepseek_train.spec.published import all_published


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code. ``arguments`` defaults to the command line."""
    return answer("deepseek-convert", __doc__, sys.argv[1:] if arguments is None else arguments, _say)


def _say(words: Sequence[str]) -> None:
    commands: dict[str, Callable[[Sequence[str]], None]] = {"to_hf": _to_hf, "from_hf": _from_hf}
    if words[0] not in commands:
        raise UsageError([f"there is no command '{words[0]}'; the commands are: {' '.join(commands)}"])
    begun = time.monotonic()
    try:
        commands[words[0]](words[1:])
    except (CheckpointError, DataError, OSError) as error:
        raise UsageError([str(error)]) from error
    print(f"ready after {time.monotonic() - begun:.1f} s")


def _to_hf(words: Sequence[str]) -> None:
    request = parse_key_values(ToHf, words, to_hf_problems)
    dtype, target = cast(HfType, request.dtype), Path(request.target)
    source = open_weights(UPath(request.source), request.weights)
    m = source.model
    tokenizer = find_tokenizer(request.tokenizer, UPath(request.source), m)
    if tokenizer is not None and isinstance(source, CheckpointWeights):
        check_same(tokenizer, source.facts.get("tokenizer"))
    size = export_bytes(m, dtype)
    with _bar(f"writing {dtype}", size) as done:
        export(
            source,
            target,
            dtype,
            extras={} if tokenizer is None else tokenizer_files(tokenizer, context_length(m)),
            tokens={} if tokenizer is None else token_ids(tokenizer),
            shard_bytes=int(request.shard_gigabytes * 1e9),
            done=done,
        )
    of = f" of {source.path}" if isinstance(source, CheckpointWeights) else ""
    print(f"{target}: {m.name}{of}, {size / 1e9:.3f} GB in {dtype}")
    for note in _notes(m, dtype, tokenizer):
        print(f"note: {note}")


def _from_hf(words: Sequence[str]) -> None:
    request = parse_key_values(FromHf, words, lambda request: target_problems(request.target))
    source, target = Path(request.source), Path(request.target)
    folder = HfFolder.open(source)
    tokenizer = find_tokenizer(request.tokenizer, source, folder.model)
    facts = {"imported_from": source.resolve().name}
    if tokenizer is not None:
        facts["tokenizer"] = tokenizer.sha256
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.unfinished")
    draft.mkdir()
    try:
        with _bar("reading", import_bytes(folder.model)) as done:
            checkpoint = import_hf(folder, draft / CHECKPOINTS, facts, done=done)
        if tokenizer is not None:
            (draft / TOKENIZER).write_bytes(tokenizer.json)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"{target / CHECKPOINTS / checkpoint.name}: {folder.model.name}")


def _notes(m: ModelConfig, dtype: HfType, tokenizer: TextTokenizer | None) -> Iterator[str]:
    """What whoever loads the folder should know."""
    if tokenizer is None:
        yield "there is no tokenizer in it"
    counted = m.experts_per_token // m.expert_groups_per_token
    if m.expert_groups_per_token < m.num_expert_groups and counted != 2:
        yield (
            f"this model scores a group of experts by its best {counted}, transformers by its best 2: "
            "tokens will go to other experts there"
        )
    if dtype == "fp8" and _has_part_blocks(m):
        yield (
            "transformers 5.23, asked to dequantise FP8, takes a matrix's size over its number of scales for the size "
            "of a block: wrong in matrices that 128 does not divide (DeepSeek-V3 has some); let it read dtype=bf16"
        )
    if m.mtp_depth and m.num_layers != 61:
        yield (
            f"transformers reports the MTP module's tensors (model.layers.{m.num_layers}.*) as unexpected: "
            "it passes over them in silence only in models of 61 layers"
        )


def _has_part_blocks(m: ModelConfig) -> bool:
    """Whether a matrix ends within a block, behind whole ones."""
    sizes = {size for one in all_published(m) if one.weight.linear for size in one.shape}
    return any(size > TILE and size % TILE for size in sizes)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; gives the function to be told of bytes that are done."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)


if __name__ == "__main__":
    sys.exit(main())
