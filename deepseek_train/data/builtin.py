"""A corpus that needs no download: Python packages that are installed wherever this one is.

Their source is code; their longer docstrings, gathered once more for each file, are the nearest thing to
prose. What is found depends on the installed versions, so manifests record them.
"""

import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from deepseek_train.data.text_files import Document

_PACKAGES = ("networkx", "numpy", "sympy", "torch")
_DROPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",  # tables
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "testing",
    "tests",
}
_DROPPED_FILES = re.compile(r"test_.*|.*_test\.py|conftest\.py|_sysconfigdata.*")
_TRIPLE_QUOTED = re.compile(
    r"""(?P<indent>^[ \t]*)?[rRuU]?(?P<quotes>\"{3}|'{3})(?P<text>.*?)(?P=quotes)""", re.M | re.S
)
_SHORTEST_DOCSTRING = 200  # characters


def package_folders() -> dict[str, Path]:
    """Name -> folder of the packages found here, the standard library among them."""
    folders = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for name in _PACKAGES:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            folders[name] = Path(found.origin).parent
    return dict(sorted(folders.items()))


def package_versions() -> dict[str, str]:
    """Name -> version of the packages found here."""
    versions = {name: importlib.metadata.version(name) for name in package_folders() if name != "stdlib"}
    return {"stdlib": platform.python_version(), **versions}


def source_files(folder: Path) -> list[str]:
    """Python files under ``folder``, relative, with ``/``, sorted; no tests."""
    found = []
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in _DROPPED_FOLDERS]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in files
            if name.endswith(".py") and not _DROPPED_FILES.fullmatch(name)
        ]
    return sorted(found)


def read_source(name: str, path: Path) -> Iterator[Document]:
    """The file itself, then its longer docstrings as one document more."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    yield Document(name, text)
    prose = docstrings(text)
    if prose:
        yield Document(f"{name}::docstrings", prose)


def docstrings(source: str) -> str:
    """Triple-quoted strings of 200 characters or more that begin a line, dedented."""
    texts = [found["text"] for found in _TRIPLE_QUOTED.finditer(source) if found["indent"] is not None]
    return "\n\n\n".join(inspect.cleandoc(text) for text in texts if len(text) >= _SHORTEST_DOCSTRING)
