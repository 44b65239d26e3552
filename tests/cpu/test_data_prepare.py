"""From text to samples: what is prepared is what was written; whole or not there; damage is found."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deepseek_train.config.schema import DataConfig
from deepseek_train.data import prepare as prepare_module
from deepseek_train.data.corpus import open_corpus, split_of
from deepseek_train.data.errors import DataError
from deepseek_train.data.loader import Cursor, TokenSource
from deepseek_train.data.manifest import Manifest, read_manifest
from deepseek_train.data.prepare import prepare
from deepseek_train.data.shards import TokenStream
from deepseek_train.data.tokenizer import load_tokenizer
from deepseek_train.data.verify import verify

TOKENIZER = load_tokenizer("builtin")
EOS, BEGIN, HOLE, END = (
    getattr(TOKENIZER.special, name) for name in ("eos", "fim_begin", "fim_hole", "fim_end")
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (folder / f"{number}.py").write_text(
            f"# file {number}\n" + f"value_{number} = {number**5}\n" * (number % 9 + 1)
        )
    return str(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(config(folder, texts), vocab_size=4096)
    return folder


def config(folder: Path, source: str, **changes: object) -> DataConfig:
    base = DataConfig(str(folder), source, fim_rate=0.3, validation_percent=20)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def stream(folder: Path, split: str) -> list[int]:
    tokens = TokenStream(folder, read_manifest(folder).of_split(split))
    everything = np.empty(len(tokens), np.int64)
    tokens.read_into(everything, 0)
    return everything.tolist()


def source(
    folder: Path, split: str = "train", length: int = 16, lookahead: int = 1, seed: int = 0
) -> TokenSource:
    return TokenSource(str(folder), split, length, lookahead, seed, 4096)  # type: ignore[arg-type]


def original(tokens: list[int]) -> str:
    """The text of one document, fill-in-the-middle undone."""
    if tokens[0] != BEGIN:
        return TOKENIZER.decode(tokens)
    hole, end = tokens.index(HOLE), tokens.index(END)
    return "".join(map(TOKENIZER.decode, (tokens[1:hole], tokens[end + 1 :], tokens[hole + 1 : end])))


def test_every_document_is_there_once_in_its_split_ended_by_eos(prepared: Path, texts: str) -> None:
    rearranged = 0
    for split in ("train", "validation"):
        tokens, documents = stream(prepared, split), []
        while tokens:
            end = tokens.index(EOS)
            rearranged += tokens[0] == BEGIN
            documents.append(original(tokens[:end]))
            tokens = tokens[end + 1 :]
        expected = [document.text for document in open_corpus(texts) if split_of(document, 20) == split]
        assert documents == expected
    assert 8 <= rearranged <= 28


def test_preparing_again_gives_the_same_bytes(prepared: Path, texts: str, tmp_path: Path) -> None:
    again = prepare(config(tmp_path / "again", texts))
    assert again == read_manifest(prepared)
    for file in sorted(prepared.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_what_is_there_is_kept_and_other_settings_are_refused(prepared: Path, texts: str) -> None:
    before = (prepared / "manifest.json").stat().st_mtime_ns
    assert prepare(config(prepared, texts)) == read_manifest(prepared)
    assert (prepared / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(
        DataError, match=r"fim_rate is 0\.3, asked for 0\.0; validation_percent is 20, asked for 5"
    ):
        prepare(config(prepared, texts, fim_rate=0.0, validation_percent=5))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, texts: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        prepare(config(tmp_path, texts))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_preparation_leaves_nothing(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prepare_module, "write_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(config(tmp_path / "tokens", texts))
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_preparations_takes_the_faster_ones(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "tokens", prepare_module._write

    def overtaken(*arguments: object) -> Manifest:
        monkeypatch.undo()
        prepare(config(folder, texts))
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "_write", overtaken)
    assert prepare(config(folder, texts)) == read_manifest(folder)
    assert [file.name for file in tmp_path.iterdir()] == ["tokens"]
    assert verify(folder, read_manifest(folder)) == []


def test_bad_settings_and_empty_splits_are_errors(tmp_path: Path, texts: str) -> None:
    target = tmp_path / "tokens"
    with pytest.raises(DataError, match=r"fim_rate=2 .*validation_percent=100 .*max_megabytes=0 "):
        prepare(config(target, texts, fim_rate=2, validation_percent=100, max_megabytes=0))
    with pytest.raises(DataError, match="4096 tokens, the model's vocabulary 4000"):
        prepare(config(target, texts), vocab_size=4000)
    (tmp_path / "one.py").write_text("one = 1")
    with pytest.raises(DataError, match="leaves a split empty: 1 documents in train, 0 held out"):
        prepare(config(target, str(tmp_path / "one.py")))
    few = tmp_path / "few"
    few.mkdir()
    for number in range(12):
        (few / f"{number}.txt").write_text(f"text number {number}")
    with pytest.raises(
        DataError, match=r"write data\.validation_percent=\d+, which holds out 1 of 12 "
    ) as empty:
        prepare(config(target, str(few), validation_percent=1))
    percent = int(re.findall(r"validation_percent=(\d+), which", str(empty.value))[0])
    assert prepare(config(target, str(few), validation_percent=percent)).documents("validation") == 1
    with pytest.raises(DataError, match=r"which holds out 11 of 12 "):
        prepare(config(tmp_path / "most", str(few), validation_percent=99))
    shutil.rmtree(target)
    (tmp_path / "blank.py").write_text("\n")
    with pytest.raises(DataError, match="the corpus is empty"):
        prepare(config(target, str(tmp_path / "blank.py")))
    assert prepare(config(target, str(tmp_path / "one.py"), validation_percent=0)).documents("train") == 1


def test_samples_are_overlapping_windows_of_the_stream(prepared: Path) -> None:
    tokens, samples = stream(prepared, "train"), source(prepared, length=16, lookahead=2)
    count = (len(tokens) - 3) // 16
    assert samples.num_sequences == count
    found = samples.sequences(range(count))
    assert found.dtype == np.int64
    assert sorted(map(tuple, found.tolist())) == sorted(
        tuple(tokens[j * 16 : j * 16 + 19]) for j in range(count)
    )
    assert not np.array_equal(samples.sequences(range(count, 2 * count)), found)
    assert samples.sequences([]).shape == (0, 19)


def test_global_batches_are_the_same_for_any_number_of_ranks(prepared: Path) -> None:
    batch = source(prepared).sequences(range(40, 52))
    for ranks in (2, 3, 4, 6):
        share = 12 // ranks
        parts = [
            source(prepared).sequences(range(40 + r * share, 40 + (r + 1) * share)) for r in range(ranks)
        ]
        assert np.array_equal(np.concatenate(parts), batch)


def test_the_order_follows_the_tokens_not_the_place_they_were_made_in(prepared: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))
    values = json.loads((moved / "manifest.json").read_text())
    values["settings"]["source"] = "elsewhere"
    (moved / "manifest.json").write_text(json.dumps(values))
    assert source(moved).manifest_hash == source(prepared).manifest_hash
    assert np.array_equal(source(moved).sequences(range(9)), source(prepared).sequences(range(9)))


def test_a_cursor_survives_json_and_refuses_another_stream(prepared: Path) -> None:
    identity = source(prepared).identity
    saved = json.loads(json.dumps(Cursor(77).as_dict(identity)))
    assert Cursor.from_dict(saved, source(prepared).identity) == Cursor(77)
    with pytest.raises(DataError, match="samples: seed was 0 and is now 1\n") as caught:
        Cursor.from_dict(saved, source(prepared, seed=1).identity)
    assert "start a new run" in caught.value.mend
    with pytest.raises(DataError, match="sequence_length was 16 and is now 8; num_sequences was"):
        Cursor.from_dict(saved, source(prepared, length=8).identity)
    with pytest.raises(DataError, match="manifest_hash was None"):
        Cursor.from_dict({"consumed_sequences": 1}, identity)
    with pytest.raises(DataError, match="consumed_sequences=-1"):
        Cursor.from_dict({**saved, "consumed_sequences": -1}, identity)


def test_ids_beyond_the_models_vocabulary_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model's vocabulary is 100"):
        TokenSource(str(prepared), "train", 16, 0, 0, 100)
    damaged = Path(shutil.copytree(prepared, tmp_path / "damaged"))
    with (damaged / "train-00000.bin").open("r+b") as file:
        file.seek(2 * 40)
        file.write((4096).to_bytes(2, "little"))
    samples = source(damaged)
    with pytest.raises(DataError, match=r"token id 4096 is not in \[0, 4096\)") as caught:
        samples.sequences(range(samples.num_sequences))
    assert caught.value.where.endswith("train-00000.bin, token 40")


def test_too_few_tokens_for_one_sequence_is_an_error(prepared: Path) -> None:
    with pytest.raises(DataError, match="validation split has .* tokens; one sequence needs 100001"):
        source(prepared, "validation", length=100_000, lookahead=0)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "train-00000.bin").read_bytes())
    content[11] ^= 1
    (folder / "train-00000.bin").write_bytes(content)


DAMAGE: list[tuple[Callable[[Path], object], str, str]] = [
    (flip_a_bit, "train-00000.bin", "checksum differs"),
    (lambda folder: (folder / "validation-00000.idx").unlink(), "validation-00000.idx", "missing"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json", "wrong size: expected"),
]


@pytest.mark.parametrize(("damage", "name", "message"), DAMAGE)
def test_verify_names_the_damaged_file(
    prepared: Path, tmp_path: Path, damage: Callable[[Path], object], name: str, message: str
) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    manifest = read_manifest(folder)
    assert verify(folder, manifest) == []
    damage(folder)
    (problem,) = verify(folder, manifest)
    assert problem.where.endswith(name)
    assert message in problem.what


def test_verify_finds_ids_the_manifest_does_not_allow(prepared: Path) -> None:
    manifest = dataclasses.replace(read_manifest(prepared), max_token_id=900)
    problems = verify(prepared, manifest)
    assert all(problem.what.endswith("the manifest allows [0, 900]") for problem in problems)
    assert len(problems) == 2


def test_a_manifest_that_is_none_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared tokens"):
        read_manifest(tmp_path)
    values = json.loads((prepared / "manifest.json").read_text())
    for damaged, message in [
        ("{", "cannot be read"),
        ("[]", "not a dict"),
        (json.dumps({**values, "format": "other 3"}), "format is 'other 3'"),
        (json.dumps({key: value for key, value in values.items() if key != "shards"}), "shards"),
        (json.dumps({**values, "surprise": 1}), "surprise"),
        (json.dumps({**values, "vocab_size": "many"}), "'many' is not a int"),
        (json.dumps({**values, "vocab_size": -1}), "vocab_size is negative"),
        (json.dumps({**values, "shards": [{"split": "train"}]}), "bin"),
    ]:
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(DataError, match=message):
            read_manifest(tmp_path)
