"""Machine facts, peak memory and the GPU probe, on a machine with or without a GPU."""

import subprocess
from pathlib import Path

import numpy as np
import pynvml
import pytest
import torch

from deepseek_train.monitor import nvml
from deepseek_train.monitor.machine import git_revision, machine_facts
from deepseek_train.monitor.memory import peak_device_bytes, peak_memory_bytes, peak_resident_bytes


def test_peak_resident_grows_by_what_is_touched_and_never_shrinks() -> None:
    before = peak_resident_bytes()
    block = np.ones(before // 8 + 2**23)  # more than everything before
    during = peak_resident_bytes()
    assert during >= before + 2**25
    del block
    assert peak_resident_bytes() >= during


def test_peak_memory_is_the_devices_where_there_is_one() -> None:
    device = peak_device_bytes()
    assert (device is not None) == torch.cuda.is_available()
    assert peak_memory_bytes() >= 2**24 if device is None else peak_memory_bytes() == device


def test_machine_facts_name_this_machine() -> None:
    facts = machine_facts()
    assert facts.cpu
    assert facts.cores >= 1
    assert facts.memory_bytes > 2**28
    assert len(facts.gpus) == torch.cuda.device_count()
    assert ("torch", torch.__version__) in facts.versions


def test_git_revision_only_of_the_tree_that_tracks_the_file(tmp_path: Path) -> None:
    tracked, stranger = tmp_path / "tracked.py", tmp_path / "stranger.py"
    tracked.write_text("a")
    stranger.write_text("b")
    assert git_revision(tracked) is None
    commit = ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "m"]
    for arguments in (["init", "-q"], ["add", "tracked.py"], commit):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    revision = git_revision(tracked)
    assert revision
    assert git_revision(stranger) is None
    tracked.write_text("changed")
    assert git_revision(tracked) == f"{revision}-dirty"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says how it is without a GPU")
def test_probe_is_quiet_on_a_cpu_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvml.GpuProbe().sample() is None
    assert capsys.readouterr().err == ""


def test_probe_says_once_why_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    probe = nvml.GpuProbe()
    assert [probe.sample(), probe.sample()] == [None, None]
    monkeypatch.setattr(nvml, "pynvml", None)
    assert nvml.GpuProbe().sample() is None
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "NVML Shared Library Not Found" in told[0]
    assert "pip install" in told[1]
