"""What a run ran on, for its report."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("deepseek-train", "torch", "deepspeed", "numpy")


@dataclass(frozen=True)
class MachineFacts:
    """This machine as this process sees it."""

    cpu: str
    cores: int  # that this process may use
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    versions: tuple[tuple[str, str], ...]  # name, version
    git_revision: (
        str | None
    )  # of this source tree, "-dirty" if changed since; None when it is installed without git


def machine_facts() -> MachineFacts:
    """Asks the operating system, torch and git; some 50 ms."""
    versions = [("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            versions.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue  # run from a source tree
    return MachineFacts(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        system=platform.platform(),
        versions=tuple(versions),
        git_revision=git_revision(Path(__file__)),
    )


def git_revision(file: Path) -> str | None:
    """``git describe`` of the tree that tracks ``file``; None if none does (a virtual environment inside
    somebody's repository must not report that repository)."""
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--dirty")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
