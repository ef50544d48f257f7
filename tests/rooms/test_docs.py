"""Documentation cannot lag behind the code."""

import difflib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from sandyard.cli import reference
from sandyard.cli.main import app
from sandyard.server.app.reference import PAGES
from sandyard.server.core.states import Status

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_made_pages_are_as_the_code_makes_them(name: str) -> None:
    there, made = (DOCS / "reference" / name).read_text(), PAGES[name]()
    changes = difflib.unified_diff(
        there.splitlines(),
        made.splitlines(),
        f"docs/reference/{name}",
        "the code",
        lineterm="",
        n=8,
    )
    assert there == made, "\n".join(
        ["run: python -m sandyard.server.app.reference", *itertools.islice(changes, 200)]
    )


def commands() -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(group: Any, path: str) -> None:
        for name, command in getattr(group, "commands", {}).items():
            found[f"{path} {name}"] = command
            walk(command, f"{path} {name}")

    walk(typer.main.get_command(app), "sandyard")
    return found


def test_every_command_and_option_is_explained_and_in_the_reference() -> None:
    text = (DOCS / "reference/cli.md").read_text()
    assert text == reference.page(), "run: python -m sandyard.cli.reference"
    for name, command in commands().items():
        assert command.help, f"{name} has no help"
        if command.hidden:
            continue
        assert f"{name}" in text
        for parameter in command.params:
            if parameter.name != "help" and not getattr(parameter, "hidden", False):
                assert parameter.help, f"{parameter.name} of {name} has no help"


def test_every_status_is_explained() -> None:
    text = (DOCS / "explanation/life.md").read_text()
    for status in Status:
        assert f"`{status}`" in text


@pytest.mark.parametrize(
    "page", sorted([*DOCS.rglob("*.md"), ROOT / "README.md"]), ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_decision_is_listed() -> None:
    index = (DOCS / "decisions/README.md").read_text()
    for page in (DOCS / "decisions").glob("0*.md"):
        assert page.name in index
