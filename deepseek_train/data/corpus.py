"""Where the text comes from: the builtin corpus, or the user's own files; which of it, and in which split.

Everything is a pure function of the files: no draw, no clock, no order of the file system.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import xxhash
from fsspec.core import url_to_fs

from deepseek_train.data.builtin import package_folders, read_source, source_files
from deepseek_train.data.errors import DataError
from deepseek_train.data.text_files import COMPRESSIONS, TEXT_SUFFIXES, Document, read_documents, split_suffix

Split = Literal["train", "validation"]

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus."""

    name: str
    group: str  # package or top folder: a cap is shared out over groups
    size: int | None  # bytes of text; None where compressed
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Corpus:
    """Documents, each text once, in a fixed order; at most ``max_bytes`` of them where that is set.

    A cap is shared evenly over the groups (what one cannot fill goes to the others), and within a group the
    files are taken in the order of their names' hashes, so what is left out is a random sample.
    """

    source: str
    files: tuple[SourceFile, ...]
    max_bytes: int | None

    @property
    def expected_bytes(self) -> int | None:
        """About how much text there will be; None when compressed files make it unknown."""
        sizes = [file.size for file in self.files if file.size is not None]
        if len(sizes) < len(self.files):
            return None
        return sum(sizes) if self.max_bytes is None else min(sum(sizes), self.max_bytes)

    def __iter__(self) -> Iterator[Document]:
        seen: set[bytes] = set()
        for group, budget in self._budgets().items():
            for document in self._documents(group):
                text = document.text.encode()
                digest = xxhash.xxh3_128_digest(text)
                if digest in seen or not text.strip():
                    continue
                seen.add(digest)
                if budget is None:
                    yield document
                elif len(text) < budget:
                    budget -= len(text)
                    yield document
                else:
                    yield Document(document.name, text[:budget].decode(errors="ignore"))
                    break

    def _documents(self, group: str) -> Iterator[Document]:
        files = [file for file in self.files if file.group == group]
        if self.max_bytes is not None:
            files.sort(key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode()), file.name))
        for file in files:
            yield from file.read()

    def _budgets(self) -> dict[str, int | None]:
        """Bytes each group may give: an even share, and what smaller groups leave over."""
        groups = sorted({file.group for file in self.files})
        if self.max_bytes is None:
            return dict.fromkeys(groups)
        sizes = {
            group: sum(
                self.max_bytes if file.size is None else file.size
                for file in self.files
                if file.group == group
            )
            for group in groups
        }
        budgets: dict[str, int | None] = {}
        left = self.max_bytes
        for waiting, group in zip(
            range(len(groups), 0, -1), sorted(groups, key=lambda g: (sizes[g], g)), strict=True
        ):
            share = min(left // waiting, sizes[group])
            budgets[group] = share
            left -= share
        return {group: budgets[group] for group in groups if budgets[group]}


def open_corpus(source: str, max_megabytes: int | None = None) -> Corpus:
    """The corpus called ``builtin`` (of some of its packages: ``builtin:numpy+torch``), or the text files at and
    below a path or fsspec URL.

    Raises:
        DataError: nothing is there, or nothing that is text.
    """
    files = _builtin_files(source) if is_builtin(source) else _user_files(source)
    return Corpus(source, tuple(files), None if max_megabytes is None else max_megabytes * MEGABYTE)


def split_of(document: Document, validation_percent: int) -> Split:
    """The split ``document`` belongs to."""
    return "validation" if percentile_of(document) < validation_percent else "train"


def percentile_of(document: Document) -> int:
    """0 to 99, by the hash of its family's name: held out are those below ``data.validation_percent``."""
    return xxhash.xxh3_64_intdigest(document.family.encode()) % 100


def is_builtin(source: str) -> bool:
    """Whether ``source`` names the builtin corpus or a part of it."""
    return source.partition(":")[0] == "builtin"


def _builtin_files(source: str) -> Iterator[SourceFile]:
    folders = package_folders()
    wanted = source.partition(":")[2]
    packages = sorted(wanted.split("+")) if wanted else list(folders)
    if missing := [name for name in packages if name not in folders]:
        what = f"the builtin corpus has no package {', '.join(map(repr, missing))}"
        raise DataError(what, f"data.source={source}", f"choose among {', '.join(folders)}")
    for package in packages:
        folder = folders[package]
        for relative in source_files(folder):
            name, path = f"{package}/{relative}", folder / relative
            yield SourceFile(name, package, path.stat().st_size, partial(read_source, name, path))


def _user_files(source: str) -> list[SourceFile]:
    suffixes = " ".join(TEXT_SUFFIXES), " ".join(COMPRESSIONS)
    mend = "give 'builtin', or a file or folder of {} (each may end in {} too)".format(*suffixes)
    try:
        system, root = url_to_fs(source)
        found = system.find(root, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"the source cannot be opened: {error}", f"data.source={source}", mend) from error
    files = []
    for path, info in sorted(found.items()):
        suffix, compression = split_suffix(path)
        if suffix not in TEXT_SUFFIXES:
            continue
        name = path.removeprefix(root).lstrip("/") or path.rsplit("/", 1)[-1]
        size = info["size"] if compression is None else None
        read = partial(read_documents, name, system, path)
        files.append(SourceFile(name, name.rpartition("/")[0].split("/")[0], size, read))
    if not files:
        what = "there is no text file there" if found else "there is nothing there"
        raise DataError(what, f"data.source={source}", mend)
    return files
