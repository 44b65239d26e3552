"""Disks that fill up and turn read-only under a run: it goes on, says so, saves when there is room again, and stops
with what it had saved when it never comes. The disks are small tmpfs, so root is needed.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deepseek_train.config.exit_codes import ExitCode
from tests.faults.commands import SMALL, numbers, run, tensors

DISKS = ("full/run", "full/checkpoints")


@pytest.fixture
def disks(whole: Path, workplace: Path) -> Iterator[Path]:
    """Two disks in ``full``: of the run, and of its checkpoints (room for three)."""
    assert whole.exists()  # it has prepared the data
    mounted: list[Path] = []
    try:
        for disk in (workplace / name for name in DISKS):
            disk.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(disk)], capture_output=True, text=True
            )
            if done.returncode:
                pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
            mounted.append(disk)
        yield workplace
    finally:
        for disk in mounted:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow_faults
def test_a_run_folder_that_is_full_at_the_start(disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the code after which starting again may help; with room there it starts."""
    monkeypatch.chdir(disks)
    with (disks / DISKS[0] / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(1 << 12)):
            pass
    refused = run(disks, *SMALL, "name=full", f"run_dir={DISKS[0]}/full", "cluster.max_restarts=1")
    assert refused.code == ExitCode.STORAGE, refused.err
    assert f"the run folder {DISKS[0]}/full cannot be written: " in refused.err
    assert "No space left on device" in refused.err
    assert "Traceback" not in refused.err
    assert "starting the ranks again (1 of 1)" in refused.err + refused.out


@pytest.mark.slow_faults
def test_a_run_outlives_its_disks(disks: Path, whole: Path) -> None:
    arguments = [
        *SMALL,
        "name=disks",
        f"run_dir={DISKS[0]}/disks",
        f"checkpoint.path={DISKS[1]}",
        "checkpoint.keep=1",
    ]
    faults, names = "fill begin 0 4; empty begin 0 6; readonly begin 0 8", ",".join(DISKS)
    stopped = run(disks, *arguments, "checkpoint.max_failures=4", FAULTS=faults, DISKS=names)
    failures = re.findall(r"WARNING: step (\d) was not saved \(failure (\d) of 4 in a row\)", stopped.out)
    # Steps 4 and 5 were not saved, 6 was; 8 was not, nor was the last one, which is tried four times.
    last = [("9", str(failure)) for failure in (2, 3, 4, 5)]
    assert failures == [("4", "1"), ("5", "2"), ("8", "1"), *last], stopped.out
    assert stopped.code == ExitCode.STORAGE, stopped.err
    assert "step 9 could not be saved: make room or mend the disk" in stopped.err
    assert "Read-only file system" in stopped.out
    assert "No space left on device" in stopped.out or "GiB left: make room" in stopped.out
    assert "Traceback" not in stopped.err
    left = {path.name for path in (disks / DISKS[1]).iterdir()}
    assert "step-00000006" in left
    assert not [name for name in left if ".tmp-" in name and "retired" not in name]

    refused = run(disks, *arguments)
    assert refused.code == ExitCode.STORAGE, refused.err
    assert f"checkpoint.path: cannot write to {DISKS[1]}: Read-only file system" in refused.err
    subprocess.run(["mount", "-o", "remount,rw", str(disks / DISKS[1])], check=True)
    done = run(disks, *arguments)
    assert done.code == 0, done.err
    assert "step-00000006 after step 6" in done.out
    assert numbers(disks / DISKS[0] / "disks") == numbers(whole)
    assert tensors(disks / "full") == tensors(whole)
