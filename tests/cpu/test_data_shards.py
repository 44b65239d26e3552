"""Token files: Megatron's bytes, written and read; streams over several of them; damage is named."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import FileEntry, Shard, write_file
from deepseek_train.data.shards import (
    ShardWriter,
    TokenStream,
    open_shard,
    read_index,
    token_dtype,
)

DOCUMENTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
UINT16, INT32 = np.dtype("<u2"), np.dtype("<i4")


def write(
    folder: Path, documents: list[list[int]], max_tokens: int, dtype: np.dtype = INT32
) -> tuple[Shard, ...]:
    writer = ShardWriter(folder, "train", dtype, max_tokens)
    for document in documents:
        writer.add(np.array(document, np.int64))
    return writer.finish()


@pytest.mark.parametrize(("dtype", "code", "letter"), [(UINT16, 8, "H"), (INT32, 4, "i")])
def test_files_are_byte_for_byte_megatrons(tmp_path: Path, dtype: np.dtype, code: int, letter: str) -> None:
    (shard,) = write(tmp_path, DOCUMENTS, 100, dtype)
    assert (tmp_path / "train-00000.bin").read_bytes() == struct.pack(f"<10{letter}", *range(5, 15))
    lengths, size = [3, 1, 2, 4], dtype.itemsize
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 4, 5)
    index += struct.pack("<4i", *lengths) + struct.pack("<4q", 0, 3 * size, 4 * size, 6 * size)
    assert (tmp_path / "train-00000.idx").read_bytes() == index + struct.pack("<5q", *range(5))
    assert (shard.tokens, shard.documents, shard.bin.size) == (10, 4, 10 * size)


def test_the_vocabulary_decides_the_type() -> None:
    assert (token_dtype(65_535), token_dtype(65_536), token_dtype(129_280)) == (UINT16, INT32, INT32)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    max_tokens=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_stream_reads_across_shards(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], max_tokens: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    ends = np.cumsum(lengths)
    shards = write(
        folder, [list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)], max_tokens
    )
    assert all(shard.tokens <= max_tokens or shard.documents == 1 for shard in shards)
    stream = TokenStream(folder, shards)
    assert len(stream) == sum(lengths)
    start = data.draw(st.integers(0, len(stream) - 1))
    window = np.full(data.draw(st.integers(1, len(stream) - start)), -1, np.int64)
    stream.read_into(window, start)
    assert window.tolist() == list(range(start, start + len(window)))
    with pytest.raises(IndexError):
        stream.read_into(window, len(stream) - len(window) + 1)


def test_a_position_is_located_in_its_file(tmp_path: Path) -> None:
    stream = TokenStream(tmp_path, write(tmp_path, DOCUMENTS, 4))
    assert stream.locate(3).endswith("train-00000.bin, token 3")
    assert stream.locate(4).endswith("train-00001.bin, token 0")


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx"])
def test_a_truncated_or_missing_file_fails_at_open(tmp_path: Path, name: str) -> None:
    shards = write(tmp_path, DOCUMENTS, 4)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-3])
    with pytest.raises(DataError, match=f"expected {len(content)} bytes, found {len(content) - 3}") as caught:
        TokenStream(tmp_path, shards)
    assert name in caught.value.where
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match="missing") as caught:
        TokenStream(tmp_path, shards)
    assert name in caught.value.where


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, DOCUMENTS, 100)
    path = tmp_path / shard.idx.name
    good = path.read_bytes()
    for damaged, message in [
        (b"garbage" + good[7:], "magic bytes"),
        (good[:9] + b"\2" + good[10:], "index version 2"),
        (good[:17] + b"\7" + good[18:], "token type 7"),
        (good[:-8], f"expected {len(good)} bytes, found {len(good) - 8}"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read_index(path)


def test_an_index_at_odds_with_its_tokens_is_refused(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, DOCUMENTS, 100)
    (tmp_path / "other").mkdir()
    (other,) = write(tmp_path / "other", [[1, 2], [3], [4, 5], [6, 7, 8, 9, 10, 11]], 100)
    (tmp_path / shard.idx.name).write_bytes((tmp_path / "other" / other.idx.name).read_bytes())
    with pytest.raises(
        DataError, match="the index counts 11 tokens of int32 in 4 documents, the manifest 10 in 4"
    ):
        open_shard(tmp_path, shard)


def test_a_file_entry_says_what_was_written(tmp_path: Path) -> None:
    entry = write_file(tmp_path / "a.bin", b"abc")
    assert entry == FileEntry("a.bin", 3, "06b05ab6733a618578af5f94892f3950")
