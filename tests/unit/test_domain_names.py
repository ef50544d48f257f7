"""Services speak the domain's language: no face's field names, paths, headers or parameters."""

import ast
import re
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[2] / "src/sandyard/server"
ROOMS = ("core", "service", "node", "links", "drivers")
CAMEL = re.compile(r"\b[a-z]+[A-Z][A-Za-z]*\b")
FACE = re.compile(r"/v1/|\bforce=|Authorization|X-API-Key|Idempotency-Key|\?[a-z]+=", re.IGNORECASE)
PATHS = [
    path
    for room in ROOMS
    for path in sorted(SERVER.glob(f"{room}/**/*.py" if "." not in room else room))
]


def raised(path: Path) -> list[ast.Call]:
    """Return the calls in a file that make an error or check a field."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id.endswith("Error") or node.func.id.startswith("check"))
    ]


def text_of(node: ast.AST) -> str:
    return "".join(
        one.value
        for one in ast.walk(node)
        if isinstance(one, ast.Constant) and isinstance(one.value, str)
    )


def names_in(node: ast.AST) -> set[str]:
    """Return the variables that an f-string shows."""
    return {
        one.value.id
        for one in ast.walk(node)
        if isinstance(one, ast.FormattedValue) and isinstance(one.value, ast.Name)
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(SERVER)))
def test_errors_name_fields_of_the_domain(path: Path) -> None:
    for call in raised(path):
        for keyword in call.keywords:
            assert keyword.arg is None or not CAMEL.fullmatch(keyword.arg), ast.unparse(call)
            if keyword.arg == "field":
                assert not CAMEL.search(text_of(keyword.value)), ast.unparse(call)
        for argument in call.args:
            assert not FACE.search(text_of(argument)), ast.unparse(call)
            if any(keyword.arg == "field" for keyword in call.keywords):
                assert "field" not in names_in(argument), f"use {{field}}: {ast.unparse(call)}"
