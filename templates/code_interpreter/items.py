"""What the code interpreter reports, by the names that E2B's SDKs know."""

from collections.abc import Awaitable, Callable, Mapping

Item = dict[str, object]
Tell = Callable[[Item], Awaitable[None]]

FORMS = {
    "text/plain": "text", "text/html": "html", "text/markdown": "markdown",
    "image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpeg", "application/pdf": "pdf",
    "text/latex": "latex", "application/json": "json", "application/javascript": "javascript",
    "e2b/data": "data", "e2b/chart": "chart",
}  # fmt: skip
ENDED: Item = {
    "type": "error",
    "name": "InterpreterEnded",
    "value": "the interpreter ended, and lost its variables; the next code starts a new one",
    "traceback": "",
}


def unquoted(text: str) -> str:
    """Return a text's value without the quotes of its representation, as E2B shows strings."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text


def result_of(data: Mapping[str, object], *, is_main: bool) -> Item:
    """Return what is reported of a value, by its MIME types."""
    found: Item = {"type": "result", "is_main_result": is_main}
    extra = {kind: value for kind, value in data.items() if kind not in FORMS}
    for kind, name in FORMS.items():
        if kind in data:
            value = data[kind]
            found[name] = (
                unquoted(value) if kind == "text/plain" and isinstance(value, str) else value
            )
    return found | ({"extra": extra} if extra else {})


def error_of(name: str, value: str, traceback: str = "") -> Item:
    """Return what is reported of an error."""
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


async def ignore(_: Item) -> None:
    """Report nothing."""
