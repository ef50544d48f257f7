"""The programs that run pieces of code in a sandbox, one for each language, and how to ask them.

They need nothing of the sandbox but the language itself. See interpreter.py for what they read and
report.
"""

import json
from base64 import b64encode
from functools import cache
from importlib import resources

from sandyard.server.core.errors import InvalidArgumentError

LANGUAGES = ("python", "node", "bash")
_SOURCES = {"python": "interpreter.py", "node": "interpreter.js", "bash": "interpreter.sh"}
_COMMANDS = {
    "python": ("python3", "-u", "-c"),
    "node": ("node", "--expose-internals", "--no-warnings", "-e"),
    "bash": ("bash", "-c"),
}


@cache
def argv_of(language: str) -> tuple[str, ...]:
    """Return the command of a language's interpreter.

    Raises:
        InvalidArgumentError: there is none for this language.
    """
    if language not in LANGUAGES:
        raise InvalidArgumentError(
            f"cannot run {language[:40]!r}: the languages are {', '.join(LANGUAGES)}",
            field="language",
        )
    source = resources.files(__name__).joinpath(_SOURCES[language]).read_text()
    return (*_COMMANDS[language], source)


def request_of(language: str, mark: str, code: str, stdin: str, timeout_ms: int) -> bytes:
    """Return what asks an interpreter to run a piece of code. It begins with a line end, in case an
    earlier request was broken off."""
    if language == "bash":
        words = (mark, *(b64encode(one.encode()).decode() for one in (code, stdin)))
        return f"\n{' '.join(words)}\n".encode()
    # Node itself stops code that never returns.
    asked = {"mark": mark, "code": code, "stdin": stdin, "timeout": timeout_ms}
    return f"\n{json.dumps(asked)}\n".encode()
