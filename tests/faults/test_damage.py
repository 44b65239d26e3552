"""Checkpoints damaged between two sessions: each is named and set aside, the newest good one is gone on from, to the
same bits; where none is good nothing is trained.
"""

from pathlib import Path

from deepseek_train.config.exit_codes import ExitCode
from tests.faults.commands import SMALL, numbers, run, tensors


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_good(
    whole: Path, copied: Path, workplace: Path
) -> None:
    steps = {step: copied / "checkpoints" / f"step-{step:08}" for step in range(1, 10)}
    file = "rank-00001.safetensors"
    content = bytearray((steps[9] / file).read_bytes())
    content[len(content) // 2] ^= 1
    (steps[9] / file).write_bytes(content)  # one bit
    (steps[8] / file).write_bytes(content[: len(content) // 2])
    (steps[7] / file).unlink()
    (steps[6] / file).write_bytes(b"")
    (steps[5] / "manifest.json").write_bytes((steps[5] / "manifest.json").read_bytes().replace(b"a", b"b", 1))
    (steps[4] / "manifest.json").unlink()
    (steps[3] / "tensors.json").write_text("{}")
    done = run(workplace, *SMALL, f"name={copied.name}")
    assert done.code == 0, done.err
    assert "resumed from" in done.out
    assert "step-00000002 after step 2" in done.out
    for step, said in {
        9: f"{file} is damaged: its xxh3_128 is ",
        8: f"{file} has {len(content) // 2} bytes, the manifest expects {len(content)}",
        7: f"{file} is missing: the manifest expects {len(content)} bytes",
        6: f"{file} has 0 bytes, the manifest expects {len(content)}",
        5: "manifest.json is damaged or was edited",
        4: "manifest.json cannot be read",
        3: "tensors.json has 2 bytes, the manifest expects ",
    }.items():
        aside = steps[step].with_name(f"step-{step:08}.bad")
        assert said in (aside / "why-bad.txt").read_text()
        assert said in done.err
    assert numbers(copied) == numbers(whole)
    assert tensors(copied) == tensors(whole)


def test_where_none_is_good_nothing_is_trained(whole: Path, copied: Path, workplace: Path) -> None:
    for folder in (copied / "checkpoints").iterdir():
        (folder / "rank-00000.safetensors").write_bytes(b"")
    before = (copied / "metrics.jsonl").read_bytes()
    done = run(workplace, *SMALL, f"name={copied.name}", "cluster.max_restarts=3")
    assert done.code == ExitCode.NO_CHECKPOINT
    assert "is whole" in done.err
    assert "step-00000009.bad" in done.err
    assert "resume=never" in done.err
    assert "starting the ranks again" not in done.err
    assert "Traceback" not in done.err
    assert (copied / "metrics.jsonl").read_bytes() == before
    assert not [path for path in (copied / "checkpoints").iterdir() if not path.name.endswith(".bad")]


def test_where_they_cannot_be_seen_nothing_begins_anew(whole: Path, copied: Path, workplace: Path) -> None:
    (copied / "checkpoints").rename(copied / "unmounted")
    before = (copied / "metrics.jsonl").read_bytes()
    done = run(workplace, *SMALL, f"name={copied.name}", "cluster.max_restarts=3")
    assert done.code == ExitCode.NO_CHECKPOINT
    assert "step 9 was saved at " in done.err
    assert "bring its disk back" in done.err
    assert "resume=never" in done.err
    assert "starting the ranks again" not in done.err
    assert (copied / "metrics.jsonl").read_bytes() == before
    (copied / "unmounted").rename(copied / "checkpoints")
    done = run(workplace, *SMALL, f"name={copied.name}")
    assert done.code == 0, done.err
    assert "step-00000009 after step 9" in done.out
    assert tensors(copied) == tensors(whole)
