"""Machine facts, peak memory and the GPU probe, on a machine with or without a GPU."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
    assert peak_resident_bytes() >= during - 2**22  # the kernel sums per-thread counts, not quite exactly


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


class FakeNvml:
    """The few calls of nvidia-ml-py that the probe makes, for the device with one UUID."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, driver: bool) -> None:
        self.driver = driver
        self.fell_off_the_bus = False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        if self.fell_off_the_bus:
            raise self.NVMLError("GPU is lost")
        assert handle == "GPU-1234"
        return SimpleNamespace(gpu=98)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=2**36)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 512_300  # milliwatts

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))


def test_probe_is_quiet_on_a_cpu_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvml.GpuProbe().sample() is None
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("one_gpu")
def test_probe_reads_this_process_s_device_until_it_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = FakeNvml(driver=True)
    monkeypatch.setattr(nvml, "pynvml", driver)
    probe = nvml.GpuProbe()
    assert probe.sample() == nvml.GpuSample(0.98, 2**36, 512.3, 61)
    driver.fell_off_the_bus = True
    assert [probe.sample(), probe.sample()] == [None, None]
    assert capsys.readouterr().err.count("GPU is lost") == 1


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("package", "reason"), [(FakeNvml(driver=False), "Shared Library Not Found"), (None, "pip install")]
)
def test_probe_says_once_why_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: FakeNvml | None,
    reason: str,
) -> None:
    monkeypatch.setattr(nvml, "pynvml", package)
    probe = nvml.GpuProbe()
    assert [probe.sample(), probe.sample()] == [None, None]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert reason in told[0]
