"""Corpora: which files, in which order, how much of them, in which split."""

import gzip
import json
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import zstandard

from deepseek_train.data.builtin import docstrings, package_versions
from deepseek_train.data.corpus import open_corpus, split_of
from deepseek_train.data.errors import DataError
from deepseek_train.data.text_files import Document


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return str(folder)


def texts(source: str, max_megabytes: int | None = None) -> dict[str, str]:
    return {document.name: document.text for document in open_corpus(source, max_megabytes)}


def test_a_folder_is_read_in_order_each_text_once(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two", "same")) + "\n\n"
    files = {"z.md": "zett", "a/b.py": "beh", "a/c.py": "same", "a/empty.py": " \n", "x.bin": "no"}
    found = texts(write(tmp_path, {**files, "[odd] *.txt": "odd", "r.jsonl": rows}))
    assert list(found.items()) == [
        ("[odd] *.txt#0", "odd"),
        ("r.jsonl#0", "one"),
        ("r.jsonl#1", "two"),
        ("r.jsonl#2", "same"),
        ("z.md", "zett"),
        ("a/b.py", "beh"),
    ]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grüße".encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "zst"}'))
    assert texts(str(tmp_path)) == {"a.txt.gz#0": "grüße", "b.jsonl.zst#0": "zst"}
    assert open_corpus(str(tmp_path)).expected_bytes is None


def test_any_fsspec_location_is_a_source() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/sub/a.txt", b"from memory")
    try:
        assert texts("memory://corpus") == {"sub/a.txt#0": "from memory"}
        assert texts("memory://corpus/sub/a.txt") == {"a.txt#0": "from memory"}
    finally:
        memory.rm("/corpus", recursive=True)


def test_a_long_text_file_becomes_many_documents_and_loses_nothing(tmp_path: Path) -> None:
    text = "".join(f"Line {number} of a long book.\n" + "\n" * (number % 5 == 0) for number in range(20_000))
    found = list(open_corpus(write(tmp_path, {"book.txt": text})))
    assert "".join(document.text for document in found) == text
    assert 20 < len(found) < 60
    assert {split_of(document, 20) for document in found} == {"train", "validation"}


def test_a_cap_is_shared_out_over_folders(tmp_path: Path) -> None:
    files = {f"big{i}/{j}.py": f"{i} {j} " * 25_000 for i in range(2) for j in range(10)}
    files["small/s.py"] = "s" * 100_000
    source = write(tmp_path, files)
    size: Counter[str] = Counter()
    for name, text in texts(source, 1).items():
        size[name.split("/")[0]] += len(text)
    assert size == {"small": 100_000, "big0": 450_000, "big1": 450_000}
    assert texts(source, 1) == texts(source, 1)


def test_the_builtin_corpus_spreads_over_packages_and_holds_no_tests() -> None:
    corpus = open_corpus("builtin", 1)
    assert not [file.name for file in corpus.files if "/tests/" in file.name or "site-packages" in file.name]
    found = list(corpus)
    size: Counter[str] = Counter()
    for document in found:
        size[document.name.split("/")[0]] += len(document.text.encode())
    assert set(size) == set(package_versions()) >= {"stdlib", "torch", "numpy"}
    assert max(size.values()) - min(size.values()) < 10
    assert 999_000 < sum(size.values()) <= 1_000_000
    assert found == list(open_corpus("builtin", 1))
    assert any(document.name.endswith("::docstrings") for document in found)


def test_packages_of_the_builtin_corpus_can_be_chosen() -> None:
    names = {file.name.split("/")[0] for file in open_corpus("builtin:torch+numpy").files}
    assert names == {"numpy", "torch"}
    with pytest.raises(DataError, match="no package 'nump'"):
        open_corpus("builtin:nump")


def test_docstrings_are_found_and_other_strings_are_not() -> None:
    prose = "All about it. " * 20
    source = f'def f():\n    r"""{prose}\n\n    and\n      more\n    """\n'
    source += f'    x = """{"y" * 300}\n"""\n    """short"""\n'
    assert docstrings(source) == f"{prose}\n\nand\n  more"


def test_docstrings_share_their_files_split() -> None:
    names = [f"torch/file{number}.py" for number in range(400)]
    code = [split_of(Document(name, ""), 25) for name in names]
    assert code == [split_of(Document(f"{name}::docstrings", ""), 25) for name in names]
    assert 60 < code.count("validation") < 140
    assert {split_of(Document(name, ""), 0) for name in names} == {"train"}


DAMAGED = [
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
    ("bad.jsonl", b'{"txt": "a"}\n', "no string 'text'"),
    ("bad.py", b"abc \xff", "not UTF-8"),
    ("bad.txt.gz", b"no gzip", "cannot be read"),
    ("bad.txt.zst", b"no zstandard", "cannot be read"),
    ("bad.txt.gz", gzip.compress(b"cut off" * 1000, mtime=0)[:-12], "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(open_corpus(str(tmp_path)))
    assert name in str(caught.value)


def test_a_source_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text file"):
        open_corpus(write(tmp_path, {"a.bin": "x"}))
    with pytest.raises(DataError, match="nothing there"):
        open_corpus(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="cannot be opened"):
        open_corpus("nosuchprotocol://x")
