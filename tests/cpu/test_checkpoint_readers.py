"""Readers of checkpoints against hostile files: what is read is what was written, or CheckpointError; and what is
kept of many checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepseek_train.checkpoint import index
from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.files import rewrite
from deepseek_train.checkpoint.folders import Found, new_draft, sweep
from deepseek_train.checkpoint.index import DTYPES, StoredTensor
from deepseek_train.checkpoint.manifest import FileRecord, Manifest, read_manifest, write_manifest
from deepseek_train.checkpoint.plan import Offer, plan_save
from deepseek_train.checkpoint.retention import Retention, retire, to_go_of_whole
from deepseek_train.checkpoint.stored import StoredCheckpoint
from deepseek_train.checkpoint.tensor_file import Part, layout_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@st.composite
def plans(draw: st.DrawFn) -> list[Offer]:
    """Some tensors, cut anywhere, dealt out to some ranks."""
    ranks: list[list[Part]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for number in range(draw(st.integers(1, 4))):
        total, dtype = draw(st.integers(1, 60)), draw(st.sampled_from(list(DTYPES.values())))
        cuts = sorted(draw(st.sets(st.integers(1, total), max_size=5)) | {0, total})
        for start, end in zip(cuts, cuts[1:], strict=False):
            part = Part(f"layers.{number}", start, end - start, total, dtype)
            ranks[draw(st.integers(0, len(ranks) - 1))].append(part)
    return [Offer(tuple(parts), ()) for parts in ranks]


def records(offers: list[Offer]) -> dict[str, FileRecord]:
    return {
        f"rank-{i:05}.safetensors": FileRecord(layout_of(o.pieces).bytes, "") for i, o in enumerate(offers)
    }


@given(plans(), st.data())
def test_every_element_has_one_place(offers: list[Offer], data: st.DataObject) -> None:
    plan = plan_save(offers)
    read = index.decode(index.encode(plan.tensors), "tensors.json", records(offers))
    assert read == {tensor.name: tensor for tensor in plan.tensors}
    taken: dict[str, set[int]] = {}
    for tensor in read.values():
        for chunk in tensor.chunks:
            places = range(chunk.offset, chunk.offset + chunk.length * tensor.dtype.itemsize)
            assert chunk.offset % tensor.dtype.itemsize == 0
            assert not taken.setdefault(chunk.file, set()) & set(places)
            taken[chunk.file] |= set(places)
        start = data.draw(st.integers(0, tensor.total))
        end = data.draw(st.integers(start, tensor.total))
        found = [i for low, high, _, _ in tensor.ranges(start, end) for i in range(low, high)]
        assert found == list(range(start, end))


@settings(max_examples=300)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_an_index_of_anything_is_refused_or_sound(content: bytes) -> None:
    try:
        found = index.decode(content, "tensors.json", {"a": FileRecord(100, "")})
    except CheckpointError:
        return
    check_sound(found)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(*[st.integers(-3, 30)] * 4), max_size=4),
    st.integers(-1, 60),
    st.sampled_from([*DTYPES, "F4", ""]),
    st.lists(st.sampled_from(["a", "b", "../a"]), max_size=2),
)
def test_an_index_of_numbers_is_refused_or_sound(
    chunks: list[tuple[int, ...]], total: int, dtype: str, files: list[str]
) -> None:
    table = {"w": {"dtype": dtype, "total": total, "chunks": chunks}}
    content = json.dumps({"files": files, "tensors": table}).encode()
    try:
        found = index.decode(content, "tensors.json", {"a": FileRecord(100, ""), "b": FileRecord(7, "")})
    except CheckpointError:
        return
    check_sound(found)


def test_no_tensor_is_larger_than_the_files_that_hold_it() -> None:
    """A small index that names the same bytes over and over must not make a reader allocate a terabyte."""
    chunks = [[1000 * i, 1000, 0, 0] for i in range(10)]
    table = {"w": {"dtype": "F32", "total": 10_000, "chunks": chunks}}
    content = json.dumps({"files": ["f"], "tensors": table}).encode()
    with pytest.raises(CheckpointError, match="'w' is larger than all files together"):
        index.decode(content, "index", {"f": FileRecord(4000, "")})


def check_sound(found: dict[str, StoredTensor]) -> None:
    for tensor in found.values():
        assert tensor.total == sum(chunk.length for chunk in tensor.chunks)
        for chunk in tensor.chunks:
            assert chunk.offset >= 0
            assert chunk.offset + chunk.length * tensor.dtype.itemsize <= {"a": 100, "b": 7}[chunk.file]


@settings(max_examples=300)
@given(JSON | st.dictionaries(st.sampled_from(["format", "step", "facts", "files"]), JSON | st.just(2)))
def test_a_manifest_of_anything_is_refused_or_sound(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    if isinstance(value, dict):  # even with a checksum that is right
        checksum = xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
        value = value | {"xxh3_128": checksum}
    (folder / "manifest.json").write_text(json.dumps(value))
    try:
        found = read_manifest(folder)
    except CheckpointError:
        return
    assert found.step >= 0
    assert all(record.bytes >= 0 for record in found.files.values())


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", "", "manifest.json", "s3:x", "a\0"]
)
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, Manifest(1, {}, {name: FileRecord(1, "0")}))
    with pytest.raises(CheckpointError, match="no plain name of a file"):
        read_manifest(tmp_path)


def test_depth_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="is no index"):
        index.decode(b"[" * 100_000, "tensors.json", {})


# Written by one process


@settings(max_examples=40)
@given(plans(), st.integers(1, 300), st.integers(1, 5))
def test_one_process_writes_and_rewrites_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, offers: list[Offer], file_bytes: int, files: int
) -> None:
    root = tmp_path_factory.mktemp("alone")
    kinds = {part.name: part for offer in offers for part in offer.pieces}
    whole = {
        name: torch.randint(0, 2 if part.dtype is torch.bool else 256, (part.total * part.dtype.itemsize,))
        .to(torch.uint8)
        .view(part.dtype)
        for name, part in kinds.items()
    }

    def produce(name: str, start: int, end: int) -> Any:
        middle = (start + end) // 2
        yield whole[name][start:middle]
        yield whole[name][middle:end]

    planned = [Planned(name, part.dtype, part.total) for name, part in kinds.items()]
    path = write_alone(root, 5, planned, produce, {"a": 1}, file_bytes)
    again = rewrite(StoredCheckpoint.open(path), root / "again", files)
    for stored in (StoredCheckpoint.open(path), StoredCheckpoint.open(again)):
        assert (stored.step, stored.facts) == (5, {"a": 1})
        for name, expected in whole.items():
            assert torch.equal(stored.read(name).view(torch.uint8), expected.view(torch.uint8))
            third = len(expected) // 3
            part = stored.read(name, third, len(expected) - 2 * third)
            assert torch.equal(
                part.view(torch.uint8), expected[third : len(expected) - third].view(torch.uint8)
            )
    for file in Path(str(path)).glob("*.safetensors"):
        load_file(file)


def test_a_producer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    planned = [Planned("w", torch.float32, 10)]
    with pytest.raises(ValueError, match="bytes were given for a layout of"):
        write_alone(tmp_path, 1, planned, lambda *_: iter([torch.zeros(2)]), {})
    assert list(tmp_path.iterdir()) == []


def test_elements_that_are_not_there_are_refused(tmp_path: Path) -> None:
    planned = [Planned("w", torch.float32, 10)]
    path = write_alone(tmp_path, 1, planned, lambda _, start, end: iter([torch.zeros(end - start)]), {})
    stored = StoredCheckpoint.open(path)
    for start, length in ((0, 11), (-1, 3), (11, 0)):
        with pytest.raises(CheckpointError, match="has 10 elements"):
            stored.read("w", start, length)
    with pytest.raises(CheckpointError, match="holds no 'v'"):
        stored.read("v")


# Which are kept

LOSSES = st.none() | st.floats(0, 10) | st.just(float("nan"))


@given(
    st.lists(st.tuples(st.integers(0, 30), LOSSES), min_size=1, unique_by=lambda made: made[0]),
    st.integers(1, 4),
    st.integers(0, 7),
    st.integers(0, 3),
    st.data(),
)
def test_what_is_kept(
    made: list[tuple[int, float | None]], last: int, every: int, best: int, data: st.DataObject
) -> None:
    found = [
        Found(Path(f"step-{step}"), step, {"validation_loss": loss})
        for step, loss in sorted(made, reverse=True)
    ]
    latest = data.draw(st.sampled_from(found))
    going = Retention(last, every, best).to_go(found, latest.path)
    kept = [one for one in found if one not in going]
    assert latest in kept
    assert len(kept) >= min(last, len(found))
    newest = [one for one in found if one != latest][: last - 1]
    losses = sorted(x for _, x in made if x is not None and x == x)[:best]
    for one in found:
        due = one in newest or one == latest or (every > 0 and one.step % every == 0)
        loss = one.facts["validation_loss"]
        good = loss is not None and loss in losses
        assert (one in kept) <= (due or good)
        assert (one in kept) >= due
    assert sum(one.facts["validation_loss"] in losses for one in kept) >= len(losses)


def test_stand_ins_go() -> None:
    stand_in = Found(Path("step-00000003.replaced"), 3, {}, superseded=True)
    others = [Found(Path(f"step-{step}"), step, {}) for step in (3, 2)]
    assert Retention(5).to_go([others[0], stand_in, others[1]], others[0].path) == [stand_in]


def test_a_stand_in_counts_where_what_took_its_place_is_damaged() -> None:
    stand_in = Found(Path("step-00000003.replaced"), 3, {}, superseded=True)
    found = [Found(Path("step-00000003"), 3, {}), stand_in, Found(Path("step-00000002"), 2, {})]
    going, damaged = to_go_of_whole(found, Retention(1), lambda one: ["torn"] if one == found[0] else [])
    assert [one.step for one in going] == [2]
    assert damaged == ["torn"]


def test_what_is_being_deleted_is_left_to_whoever_deletes(tmp_path: Path) -> None:
    half = tmp_path / "step-00000001.tmp-retired"
    half.mkdir()
    draft = new_draft(tmp_path, 2)
    sweep(tmp_path, 2)
    assert half.exists()
    assert not draft.exists()
    again = new_draft(tmp_path, 2)
    retire(tmp_path, tmp_path / "step-00000002", Retention())
    assert [*tmp_path.iterdir()] == [again]
