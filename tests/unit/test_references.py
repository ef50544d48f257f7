"""What docstrings and pages name is there: modules, protocols, files."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(
    r"[Ss]ee ((?:core|node|drivers|service|links|guest|app|front|gateway)\.[\w.]*\w)"
)
FILES = re.compile(r"`((?:src|tests|bench|scripts|templates|docs)/[\w./-]*\w)`")
INNER = re.compile(
    r"`((?:core|node|drivers|service|links|guest|app|api|front|pages|gateway)/[\w./-]*\.py)`"
)


def resolves(name: str) -> bool:
    """Tell whether a dotted name below the server is a module, or something in one."""
    parts = ["sandyard", "server", *name.split(".")]
    for cut in range(len(parts), 2, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for attribute in parts[cut:]:
            if not hasattr(found, attribute):
                return attribute in getattr(found, "__annotations__", {})
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_what_a_docstring_sends_the_reader_to_is_there(path: Path) -> None:
    for name in NAMED.findall(path.read_text()):
        assert resolves(name), f"{path}: there is no {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(path: Path) -> None:
    text = path.read_text()
    for name in FILES.findall(text):
        assert (ROOT / name).exists(), f"{path}: there is no {name}"
    for name in INNER.findall(text):
        assert (ROOT / "src/sandyard/server" / name).exists(), f"{path}: there is no {name}"
