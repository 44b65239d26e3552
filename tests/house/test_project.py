"""Rules about what lies around the source: paths, YAML, make targets, the lock."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Folders of one machine, which nobody else has. (Split, so that this file may be searched as well.)
MACHINE_PATH = re.compile(
    "|".join(["/" + "root/", "/" + r"home/\w", "/" + "work/", "/" + r"Users/\w", "/" + "tmp/venv"])
)
MARKDOWN = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]


def tracked() -> list[Path]:
    """All files of the project: git's, or without git (a source archive) everything that is not hidden."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / path for path in listed.stdout.split("\0") if path]
    else:
        paths = [
            p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
        ]
    return [path for path in paths if path.is_file()]


def test_no_path_of_one_machine() -> None:
    found = []
    for path in tracked():
        text = path.read_text(errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


def test_the_rule_above_sees() -> None:
    assert MACHINE_PATH.search("cd " + "/" + "home/ada/x")
    assert not MACHINE_PATH.search("WORKDIR /workspace/x")


def test_every_yaml_loads() -> None:
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths, "configs/ has no YAML"
    for path in paths:
        assert isinstance(yaml.safe_load(path.read_text()), dict | None), path


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def targets_named_in(text: str) -> set[str]:
    """``make x`` in code: a line of a block, or between backticks."""
    return set(re.findall(r"(?:^|`)(?:\$ )?make ([a-z][a-z-]*)", text, re.MULTILINE))


def test_the_readme_names_the_two_commands() -> None:
    assert {"train", "test"} <= targets_named_in((ROOT / "README.md").read_text())


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_make_targets_named_in_documents_exist(path: Path) -> None:
    assert targets_named_in(path.read_text()) - make_targets() == set()


def test_make_help_lists_every_target() -> None:
    printed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in printed.splitlines() if line[0].islower()} == make_targets()


def test_the_lock_pins_every_dependency_and_no_local_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for extra, rs in project["optional-dependencies"].items() if extra != "triton" for r in rs]
    wanted = {_canonical(re.split(r"[<>=;\[ ]", r)[0]) for r in [*project["dependencies"], *extras]}
    lines = [line for line in (ROOT / "requirements/lock.txt").read_text().splitlines() if line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert wanted - {_canonical(line.split("==")[0]) for line in lines} == set()


def test_the_makefile_and_the_lock_agree_on_torch() -> None:
    pinned = re.search(r"^torch==\S+$", (ROOT / "requirements/lock.txt").read_text(), re.MULTILINE)
    assert pinned
    assert f"{pinned[0]}\n" in (ROOT / "Makefile").read_text()


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_pytest_ignores_no_test(request: pytest.FixtureRequest) -> None:
    ignored = request.config.hook.pytest_ignore_collect
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert [path for path in folders if ignored(collection_path=path, config=request.config)] == []


def test_git_ignores_no_source() -> None:
    """``dist/`` in .gitignore once swallowed ``tests/dist/``."""
    command = [
        "git",
        "ls-files",
        "--others",
        "--ignored",
        "--exclude-standard",
        "deepseek_train",
        "tests",
        "configs",
    ]
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    assert [path for path in listed if path.endswith((".py", ".yaml"))] == []


def test_every_package_is_installed() -> None:
    """pyproject.toml lists packages by hand, because configs/ is installed under another name."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(path.parent.relative_to(home).parts)
        for home, package in ((ROOT, "deepseek_train"), (ROOT / "kernels", "deepseek_kernels"))
        for path in (home / package).rglob("__init__.py")
    }
    assert set(listed) == folders | {"deepseek_train_configs"}
