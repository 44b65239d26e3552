"""A run with data that are not its own: refused with both hashes, unless that is asked for; then it is written down."""

import json
import shutil
from pathlib import Path

import pytest

from deepseek_train.config.exit_codes import ExitCode
from deepseek_train.monitor.events import read_events
from tests.faults.commands import SMALL, numbers, run

OTHER = ["data.source=more", "data.path=other"]
LONGER = "train.total_tokens=704"  # two steps more


def manifest(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "manifest.json").read_text()))


@pytest.mark.slow_faults
def test_other_data_are_refused_or_written_down(whole: Path, copied: Path, workplace: Path) -> None:
    shutil.copytree(workplace / "text", workplace / "more")
    (workplace / "more" / "one.py").write_text("print('one more')\n" * 50)
    named = [*[one for one in SMALL if not one.startswith("data.source") and not one.startswith("data.path")]]
    named += [f"name={copied.name}", LONGER]
    refused = run(workplace, *named, *OTHER)
    assert refused.code == ExitCode.USER_ERROR
    assert "source was text, is more" in refused.err  # before anything is prepared or starts
    assert not (workplace / "other").exists()

    # The same settings, but another text: only its hash tells.
    done = run(workplace, "data.allow_change=true", *named, *OTHER)
    assert done.code == 0, done.err
    (event,) = read_events(copied)
    assert (event.step, event.what) == (9, "other data")
    assert " was '" in event.why
    assert " and is now '" in event.why
    assert f"step 9, other data: {event.why}" in done.out
    assert [step[0] for step in numbers(copied)] == list(range(1, 12))
    assert numbers(copied)[:9] == numbers(whole)


@pytest.mark.slow_faults
def test_data_under_the_same_name_are_told_by_their_hash(whole: Path, copied: Path, workplace: Path) -> None:
    folder = workplace / "hashes"
    shutil.copytree(workplace / "text", folder / "text")
    (folder / "text" / "one.py").write_text("print('one more')\n" * 50)
    (folder / "runs").mkdir()
    shutil.copytree(copied, folder / "runs" / "hash")
    refused = run(folder, *SMALL, "name=hash", LONGER)
    assert refused.code == ExitCode.USER_ERROR
    assert "the saved position belongs to another stream of samples: " in refused.err
    assert "data.allow_change=true" in refused.err
    assert "Traceback" not in refused.err
    hashes = json.loads((copied / "checkpoints/step-00000009/manifest.json").read_text())["facts"]["cursor"]
    (changed,) = [str(value) for value in hashes.values() if f"was '{value}' and is now '" in refused.err]
    assert len(changed) > 16
    assert numbers(folder / "runs" / "hash") == numbers(whole)
