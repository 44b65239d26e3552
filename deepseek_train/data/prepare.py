"""Text to token shards: corpus -> split -> fill-in-the-middle -> tokens -> ``.bin/.idx``, ``manifest.json``.

All is written beside the target and renamed into place at the end, so a folder of tokens is whole or not
there. The same text and settings give the same bytes.
"""

import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_train.config.credentials import MEND, holds_credentials
from deepseek_train.config.schema import DataConfig
from deepseek_train.data.builtin import package_versions
from deepseek_train.data.corpus import Corpus, is_builtin, open_corpus, percentile_of, split_of
from deepseek_train.data.errors import DataError
from deepseek_train.data.fim import choose_cut
from deepseek_train.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    Settings,
    read_manifest,
    write_file,
)
from deepseek_train.data.shards import ShardWriter, Tokens, token_dtype
from deepseek_train.data.text_files import Document
from deepseek_train.data.tokenizer import TextTokenizer, load_tokenizer

FIM_SEED = 0
_CHUNK_CHARACTERS = 2_000_000  # tokenised at once, on all cores


def prepare(config: DataConfig, vocab_size: int | None = None, progress: bool = False) -> Manifest:
    """Tokens of ``config.source`` in the folder ``config.path``; what the same settings left there is kept.

    ``vocab_size`` is the model's (None: any will do). ``progress`` draws a bar, where stderr is a terminal.

    Raises:
        DataError: the folder holds something else, the text or the tokenizer cannot be used, or a split is
        empty.
    """
    problems = settings_problems(config)
    if problems:
        raise DataError("; ".join(problems), "data configuration", "set these values to what is allowed")
    folder = Path(config.path)
    tokenizer = load_tokenizer(config.tokenizer)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}",
            f"data.tokenizer={config.tokenizer}",
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or use a smaller tokenizer",
        )
    if config.source is None:
        what = "there are no prepared tokens here and no text to prepare them from"
        raise DataError(what, config.path, "give data.source, or the data.path of prepared tokens")
    settings = _settings(config.source, config, tokenizer)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _reuse(folder, settings)
    corpus = open_corpus(config.source, config.max_megabytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.unfinished"
    unfinished.mkdir()
    try:
        manifest = _write(unfinished, corpus, tokenizer, settings, progress)
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / MANIFEST_FILE).exists():
                raise
            return _reuse(folder, settings)  # another process was faster
        return manifest
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def settings_problems(config: DataConfig) -> list[str]:
    """What is wrong with the values in ``config``, each with what is allowed."""
    problems = []
    if not 0 <= config.fim_rate <= 1:
        problems.append(f"data.fim_rate={config.fim_rate} is not in [0, 1]")
    if not 0 <= config.validation_percent < 100:
        problems.append(f"data.validation_percent={config.validation_percent} is not in [0, 99]")
    if config.max_megabytes is not None and config.max_megabytes < 1:
        problems.append(f"data.max_megabytes={config.max_megabytes} is neither positive nor null (all of it)")
    if config.sequence_length < 1:
        problems.append(f"data.sequence_length={config.sequence_length} is not positive")
    if config.source is not None and holds_credentials(config.source):
        problems.append(
            f"data.source holds a key, a password or a token, which would be written down. {MEND}"
        )
    return problems


def check_prepared(config: DataConfig) -> None:
    """Raises DataError where ``config.path`` holds tokens of other settings than ``config`` asks for; a source of None
    takes whatever is there."""
    folder = Path(config.path)
    if config.source is not None and (folder / MANIFEST_FILE).exists():
        _reuse(folder, _settings(config.source, config, load_tokenizer(config.tokenizer)))


def _settings(source: str, config: DataConfig, tokenizer: TextTokenizer) -> Settings:
    return Settings(
        source,
        tokenizer.sha256,
        config.max_megabytes,
        config.fim_rate,
        FIM_SEED,
        config.validation_percent,
    )


def _reuse(folder: Path, settings: Settings) -> Manifest:
    if not (folder / MANIFEST_FILE).exists():
        mend = "choose another data.path"
        raise DataError("this is no folder of prepared tokens, and it is not empty", str(folder), mend)
    manifest = read_manifest(folder)
    found, wanted = asdict(manifest.settings), asdict(settings)
    differing = [
        f"{key} is {found[key]!r}, asked for {wanted[key]!r}" for key in wanted if found[key] != wanted[key]
    ]
    if differing:
        raise DataError(
            "the tokens here were prepared with other settings: " + "; ".join(differing),
            str(folder),
            "to use them as they are, say data.source=null; to prepare these settings, choose another data.path",
        )
    return manifest


def _write(
    folder: Path, corpus: Corpus, tokenizer: TextTokenizer, settings: Settings, progress: bool
) -> Manifest:
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(folder, split, dtype) for split in ("train", "validation")}
    max_token_id = text_bytes = 0
    percentiles: Counter[int] = Counter()
    columns = (TextColumn("preparing tokens"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=corpus.expected_bytes)
        for chunk in _chunks(corpus):
            for document, tokens_N in zip(chunk, tokenise(chunk, tokenizer, settings), strict=True):
                writers[split_of(document, settings.validation_percent)].add(tokens_N)
                percentiles[percentile_of(document)] += 1
                max_token_id = max(max_token_id, int(tokens_N.max()))
            chunk_bytes = sum(len(document.text.encode()) for document in chunk)
            text_bytes += chunk_bytes
            bar.advance(task, chunk_bytes)
    shards = tuple(shard for writer in writers.values() for shard in writer.finish())
    manifest = Manifest(
        settings,
        tokenizer.vocab_size,
        max_token_id,
        text_bytes,
        package_versions() if is_builtin(settings.source) else {},
        write_file(folder / TOKENIZER_FILE, tokenizer.json),
        shards,
    )
    _check_splits(manifest, percentiles)
    manifest.write(folder)
    return manifest


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def tokenise(documents: list[Document], tokenizer: TextTokenizer, settings: Settings) -> Iterator[Tokens]:
    """Tokens of each document, shape [tokens], with end-of-sentence at the end, some rearranged for FIM."""
    cuts = [choose_cut(d.name, len(d.text), settings.fim_rate, settings.fim_seed) for d in documents]
    pieces = [
        piece
        for document, cut in zip(documents, cuts, strict=True)
        for piece in ([document.text] if cut is None else cut.pieces(document.text))
    ]
    encoded = iter(tokenizer.encode_batch(pieces))
    special = tokenizer.special
    for cut in cuts:
        if cut is None:
            ids = [*next(encoded), special.eos]
        else:
            prefix, suffix, middle = next(encoded), next(encoded), next(encoded)
            ids = [
                special.fim_begin,
                *prefix,
                special.fim_hole,
                *suffix,
                special.fim_end,
                *middle,
                special.eos,
            ]
        yield np.array(ids, np.int64)


def _check_splits(manifest: Manifest, percentiles: Counter[int]) -> None:
    source, percent = manifest.settings.source, manifest.settings.validation_percent
    if not manifest.shards:
        raise DataError(
            "the corpus is empty: there is no text in its files", f"data.source={source}", "give text"
        )
    if not manifest.of_split("train") or (percent and not manifest.of_split("validation")):
        counts = (
            f"{manifest.documents('train')} documents in train, {manifest.documents('validation')} held out"
        )
        raise DataError(
            f"data.validation_percent={percent} leaves a split empty: {counts}",
            f"data.source={source}",
            _other_percent(percent, percentiles),
        )


def _other_percent(percent: int, percentiles: Counter[int]) -> str:
    """What to write where a split is empty: of few documents the next percentage may hold out none, or all."""
    low, high = min(percentiles) + 1, max(percentiles)
    more = "give more documents, or data.validation_percent=0 (hold nothing out)"
    if low > high:
        return more
    nearest = min(max(percent, low), high)
    held_out = sum(documents for at, documents in percentiles.items() if at < nearest)
    of = f"{held_out} of {percentiles.total()} documents"
    return f"write data.validation_percent={nearest}, which holds out {of}; or {more}"
