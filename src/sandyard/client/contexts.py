"""Calls of contexts, and what code in them reports."""

import base64
import binascii
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from sandyard.client import calls
from sandyard.client.errors import NotFoundError
from sandyard.client.models import CodeError, CodeResult, RemotePath, Result
from sandyard.client.streams import EVENTS_S, Followed

OnText = Callable[[str], object]
Shown = Callable[[Result], object]
_NAMES = {"javascript": "node", "js": "node", "sh": "bash", "py": "python"}
_PICTURES = ("png", "jpeg", "pdf")


def name_of(language: str) -> str:
    """Return a language by its usual names as the server knows it."""
    return _NAMES.get(language.lower(), language)


def is_absent(error: NotFoundError) -> bool:
    """Tell whether an error means that a context is gone, and not its sandbox."""
    return error.details.get("reason") == "no_context"


class Running(Followed[None]):
    """What a piece of code reports, collected."""

    def __init__(
        self, on_stdout: OnText | None, on_stderr: OnText | None, on_result: Shown | None
    ) -> None:
        super().__init__("", {})
        self.callbacks = calls.Callbacks()
        self._on_text = {"stdout": on_stdout, "stderr": on_stderr}
        self._on_result = on_result
        self._output: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._room = dict.fromkeys(self._output, calls.OUTPUT_MAX)
        self._results: list[Result] = []
        self._error: CodeError | None = None
        self._is_cut = False

    def _is_refusal(self, name: str, data: Any) -> bool:
        return name == "error" and "name" not in data  # which an error of the code has

    def _event(self, name: str, data: Any, number: str | None) -> None:
        match name:
            case "stdout" | "stderr":
                text = str(data["text"])
                self._is_cut = self._is_cut or len(text) > self._room[name]
                self._output[name].append(text[: self._room[name]])
                self._room[name] -= min(len(text), self._room[name])
                self.callbacks.tell(self._on_text[name], text)
            case "result":
                result = _result_of(data)
                self._is_cut = self._is_cut or result.truncated
                self._results.append(result)
                self.callbacks.tell(self._on_result, result)
            case "error":
                self._error = CodeError(
                    str(data["name"]), str(data["value"]), str(data["traceback"])
                )
            case "end":
                self.is_over = True
            case _:
                pass  # of a later version

    def result(self) -> CodeResult:
        """Return all of it."""
        main = [one.text for one in self._results if one.is_main]
        return CodeResult(
            "".join(self._output["stdout"]),
            "".join(self._output["stderr"]),
            main[-1] if main else None,
            self._error,
            truncated=self._is_cut,
            results=tuple(self._results),
        )


def _result_of(data: Mapping[str, Any]) -> Result:
    forms = {name: one for name, one in data.items() if name not in ("isMain", "truncated")}
    for name in _PICTURES:
        if name in forms:
            with suppress(binascii.Error, ValueError):
                forms[name] = base64.b64decode(forms[name])
    return Result(
        text=str(forms.pop("text", "")),
        forms=forms,
        is_main=data.get("isMain") is True,
        truncated=data.get("truncated") is True,
    )


def create(path: str, language: str, cwd: RemotePath, user: str) -> calls.Call[Any]:
    """Start an interpreter."""
    body = {"language": name_of(language), "cwd": str(cwd), "user": user}
    return calls.Call("POST", path, _data, body=body, headers=calls.keyed(None), safe=True)


def get(path: str, context_id: str) -> calls.Call[Any]:
    """Find a context."""
    return calls.Call("GET", calls.part_of(path, context_id), _data, safe=True)


def listing(path: str) -> calls.Call[list[Any]]:
    """List the contexts of a sandbox."""
    return calls.Call("GET", path, lambda a: list(a["data"]), safe=True)


def act(path: str, action: str) -> calls.Call[Any]:
    """Restart or interrupt a context."""
    return calls.Call("POST", f"{path}/{action}", _data)


def delete(path: str) -> calls.Call[Any]:
    """Delete a context."""
    return calls.Call("DELETE", path, _data)


def run(path: str, code: str, timeout_s: float, stdin: str) -> calls.Call[Any]:
    """Run code in a context."""
    body = {"code": code, "timeout": calls.milliseconds(timeout_s), "stdin": stdin}
    return calls.Call("POST", f"{path}/run", _data, body=body, limit_s=EVENTS_S)


def _data(answer: Any) -> Any:
    return answer["data"]
