"""Benches run small, for tests: they work, whatever the figures are."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.server import longer

_ROOT = Path(__file__).parents[2]


def figures_of(bench: str, *arguments: str, limit_s: float = 280) -> list[float]:
    """Run a bench and return its figures; fail if it does not end well or one is no number."""
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{bench}", *arguments],
        cwd=_ROOT, env={**os.environ, "PYTHONPATH": f"{_ROOT}/src:{_ROOT}"},
        capture_output=True, text=True, check=False, timeout=longer(limit_s),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [one for value in _documents(done.stdout) for one in _numbers(value)]
    assert found, done.stdout
    assert all(math.isfinite(one) for one in found), done.stdout
    return found


def _documents(text: str) -> list[Any]:
    """Return the JSON objects and lists in what was printed, whatever stands between them."""
    found, decoder, end = [], json.JSONDecoder(), 0
    for begin in re.finditer(r"[\[{]", text):
        if begin.start() >= end:
            with suppress(ValueError):
                value, end = decoder.raw_decode(text, begin.start())
                found.append(value)
    return found


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [one for part in value.values() for one in _numbers(part)]
    if isinstance(value, list):
        return [one for part in value for one in _numbers(part)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []
