"""A process's own pages of a file that it maps: found, copied, and laid over that file again."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandyard.server.core.errors import UnavailableError
from sandyard.server.drivers.qemu import memory as pages
from sandyard.server.drivers.qemu.memory import load_pages, merge, save_pages

PAGE, COUNT = 4096, 8192
# More than are copied at once, by their number and by their size; and the first and last page.
SINGLE = range(0, 2500, 2)
LONG = range(3000, COUNT)
HOLDER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    held = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
for number in eval(sys.argv[2]):
    held[number * 4096 : number * 4096 + 8] = number.to_bytes(8, "big")
print("held", flush=True)
for line in sys.stdin:
    sys.stdout.buffer.write(held[:])
    sys.stdout.flush()
    break
"""


@contextmanager
def held(memory: Path, numbers: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that maps a file and has written to some of its pages for itself."""
    line = [sys.executable, "-c", HOLDER, str(memory), numbers]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def expected(base: bytes) -> bytes:
    image = bytearray(base)
    for number in (*SINGLE, *LONG):
        image[number * PAGE : number * PAGE + 8] = number.to_bytes(8, "big")
    return bytes(image)


@pytest.mark.parametrize("way", ["at once", "by file"])
def test_what_a_process_wrote_is_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "by file":
        monkeypatch.setattr(pages, "_read_stretches", lambda *_: -1)
    else:
        monkeypatch.delattr(pages, "_gather_by_file")
    memory, saved, whole = (tmp_path / name for name in ("memory", "pages", "whole"))
    base = bytes(number % 251 for number in range(PAGE)) * COUNT
    memory.write_bytes(base)
    with held(memory, f"(*{SINGLE!r}, *{LONG!r})") as process:
        save_pages(process.pid, memory, saved)
    assert saved.stat().st_size < PAGE * (len(SINGLE) + len(LONG) + 10)
    merge(memory, saved, whole)
    assert whole.read_bytes() == expected(base)
    with held(memory, "()") as process:
        load_pages(process.pid, memory, saved)
        said, _ = process.communicate(b"\n", timeout=30)
    assert said == expected(base)


@pytest.mark.parametrize("way", ["at once", "by file", "another has its number"])
def test_memory_of_a_process_that_ends_meanwhile_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(PAGE * 4))
    find = pages._private_runs
    with held(memory, "(1, 3)") as process:

        def end_then(*where: int) -> list[pages.Run]:
            found = find(*where)
            assert found == [(1, 1), (3, 1)]
            process.kill()
            process.wait()
            return found

        monkeypatch.setattr(pages, "_private_runs", end_then)
        if way == "by file":
            monkeypatch.setattr(pages, "_read_stretches", lambda *_: -1)
        elif way == "another has its number":
            monkeypatch.setattr(pages, "_read_stretches", lambda *_: 2 * PAGE)
        with pytest.raises(UnavailableError, match="has ended"):
            save_pages(process.pid, memory, tmp_path / "pages")


def test_memory_of_a_process_that_has_ended_is_not_saved(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(PAGE))
    with pytest.raises(UnavailableError, match="has ended"):
        save_pages(2**22 + 1, memory, tmp_path / "pages")
