"""Log formats: JSON for programs, text on a terminal. Context variables add ids."""

import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

request_id: ContextVar[str] = ContextVar("request_id", default="")

_KINDS_MAX = 10_000
_PLAIN = set(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        line |= {key: value for key, value in vars(record).items() if key not in _PLAIN}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A line for people, with variable parts at its end."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        extra = {key: value for key, value in vars(record).items() if key not in _PLAIN}
        if request_id.get():
            extra["request_id"] = request_id.get()
        facts = "".join(f" {key}={value}" for key, value in extra.items())
        stamp = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        text = f"{stamp} {record.levelname.lower():7} {record.getMessage()}{facts}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class Folded(logging.Filter):
    """Passes a repeated line a few times per period, then only reports how often it came.

    A flood of connections or a full disk repeats a line thousands of times a second, which must not
    fill the disk.
    """

    def __init__(self, *, most: int = 100, window_s: float = 10.0) -> None:
        super().__init__()
        self._lock = threading.Lock()  # a handler's filters are asked outside its own
        self._most = most
        self._window_s = window_s
        self._ends = 0.0
        self._seen: Counter[tuple[str, int, str]] = Counter()

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is written. See logging.Filter."""
        with self._lock:
            return self._passes(record)

    def _passes(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        folded = 0
        if now >= self._ends:
            folded = sum(max(0, count - self._most) for count in self._seen.values())
            self._seen.clear()
            self._ends = now + self._window_s
        if folded:
            record.left_out = folded
        line = (record.name, record.levelno, str(record.msg))
        if line not in self._seen and len(self._seen) >= _KINDS_MAX:
            return True
        self._seen[line] += 1
        return self._seen[line] <= self._most or bool(folded)


class _PrivateFile(RotatingFileHandler):
    """A log file readable by its owner and group only: it names sandboxes and people."""

    @override
    def _open(self) -> Any:
        descriptor = os.open(
            self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640
        )
        os.fchmod(descriptor, 0o640)
        return os.fdopen(descriptor, self.mode, encoding="utf-8", errors="backslashreplace")


def set_up_logs(
    *,
    level: str,
    form: Literal["auto", "text", "json"],
    file: Path | None = None,
    file_mib: int = 32,
) -> None:
    """Send all log lines to standard error, or to a file that is rotated by size."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = _PrivateFile(file, maxBytes=file_mib * 2**20, backupCount=2, delay=True)
    is_terminal = file is None and sys.stderr.isatty()
    wants_text = form == "text" or (form == "auto" and is_terminal)
    handler.setFormatter(TextFormatter() if wants_text else JsonFormatter())
    handler.addFilter(Folded())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("alembic", "asyncio", "uvicorn.error", "pyroute2"):
        logging.getLogger(noisy).setLevel("WARNING")
    logging.getLogger("asyncio").addFilter(_means_something)


def _means_something(record: logging.LogRecord) -> bool:
    """Tell whether a line of asyncio's is useful. A stream wrapped in TLS (as by the NATS client)
    logs a warning each time the peer closes."""
    return not record.getMessage().startswith("returning true from eof_received()")
