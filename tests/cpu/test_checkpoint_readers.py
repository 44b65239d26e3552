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

from deepseek_train.checkpoint import CheckpointError, Retention, index
from deepseek_train.checkpoint.alone import Planned, write_alone
from deepseek_train.checkpoint.files import rewrite
from deepseek_train.checkpoint.folders import Found
from deepseek_train.checkpoint.index import DTYPES, StoredTensor
from deepseek_train.checkpoint.manifest import FileRecord, Manifest, read_manifest, write_manifest
from deepseek_train.checkpoint.plan import Offer, plan_save
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
    stand_in = Found(Path("step-00000003.replaced"), 3, {})
    others = [Found(Path(f"step-{step}"), step, {}) for step in (3, 2)]
    assert Retention(5).to_go([others[0], stand_in, others[1]], others[0].path) == [stand_in]
