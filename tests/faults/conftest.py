"""The run that nothing befell, which all others must end like."""

import shutil
from pathlib import Path

import pytest

from tests.faults.commands import SMALL, run, write_text


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some text in it."""
    folder = tmp_path_factory.mktemp("faults")
    write_text(folder)
    return folder


@pytest.fixture(scope="session")
def whole(workplace: Path) -> Path:
    """The run's folder, with a checkpoint of each of its nine steps."""
    done = run(workplace, *SMALL, "name=whole", "checkpoint.every=1", "checkpoint.keep=9")
    assert done.code == 0, done.err
    return workplace / "runs" / "whole"


@pytest.fixture
def copied(whole: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the whole run, named after the test's last word."""
    name = str(request.node.name).rpartition("_")[2]
    return Path(shutil.copytree(whole, whole.with_name(name)))
