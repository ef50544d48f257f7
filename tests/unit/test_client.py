"""The SDK without a server: what it asks, how it reads answers, when it asks again."""

import asyncio
import inspect
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sandyard.client as sdk
from sandyard.client import archives, calls, code
from sandyard.client.calls import Call, Heard, Retries, refusal_of, result_of
from sandyard.client.config import ClientConfig, ConfigError, find_config, write_config
from sandyard.client.errors import TransferError
from sandyard.client.models import CodeResult, Exited, FileChange, Lost, Printed, ProcessEvent
from sandyard.client.streams import Following, Watching

PAIRS = [
    (sdk.Sandyard, sdk.AsyncSandyard), (sdk.Sandbox, sdk.AsyncSandbox),
    (sdk.Files, sdk.AsyncFiles), (sdk.Process, sdk.AsyncProcess), (sdk.Desktop, sdk.AsyncDesktop),
    (sdk.Processes, sdk.AsyncProcesses),
]  # fmt: skip


@pytest.mark.parametrize(("threads", "loop"), PAIRS)
def test_both_clients_offer_the_same(threads: type, loop: type) -> None:
    def offered(kind: type) -> dict[str, list[tuple[str, object, object]]]:
        found: dict[str, list[tuple[str, object, object]]] = {}
        for name, one in inspect.getmembers(kind):
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(one, property):
                found[name] = [("property", None, None)]
            elif callable(one):
                parameters = inspect.signature(one).parameters.values()
                found[name] = [(each.name, each.kind, each.default) for each in parameters]
        return found

    assert offered(threads) == offered(loop)
    for name in offered(threads):
        assert inspect.getdoc(getattr(loop, name)), name


def test_to_import_the_package_loads_nothing_of_it() -> None:
    look = "import sys, sandyard; print([m for m in sys.modules if m.split('.')[0] in"
    done = subprocess.run(
        [sys.executable, "-c", f"{look} ('httpx', 'asyncio', 'typer', 'rich')])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    whole = "import sys; from sandyard import Sandbox, Sandyard, AsyncSandbox; print([m for m in"
    done = subprocess.run(
        [sys.executable, "-c", f"{whole} sys.modules if m.startswith('sandyard.server')])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


# --- where the server is --------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("SANDYARD_URL", "SANDYARD_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_what_is_given_wins_over_the_environment_and_that_over_the_file(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="SANDYARD_URL"):
        find_config(None, None)
    with pytest.raises(ConfigError, match="SANDYARD_URL"):
        find_config("rt_live_x", None)
    write_config(ClientConfig("http://file:1", "rt_live_file"))
    assert find_config(None, None) == ClientConfig("http://file:1", "rt_live_file")
    assert find_config("rt_live_x", None) == ClientConfig("http://file:1", "rt_live_x")
    assert find_config(None, "http://a:2") == ClientConfig("http://a:2", "rt_live_file")
    monkeypatch.setenv("SANDYARD_URL", "https://env/v1/")
    assert find_config(None, None) == ClientConfig("https://env", "rt_live_file")
    monkeypatch.setenv("SANDYARD_API_KEY", "rt_live_env")
    (nowhere / "sandyard/config.toml").write_text("not = [toml")
    assert find_config(None, None) == ClientConfig("https://env", "rt_live_env")
    monkeypatch.delenv("SANDYARD_API_KEY")
    with pytest.raises(ConfigError, match="mend it"):
        find_config(None, None)
    for key, url in (("rt_live_x", "host:1"), ("rt_live_ü", "http://a"), ("a\nb", "http://a")):
        with pytest.raises(ConfigError):
            find_config(key, url)


# --- answers --------------------------------------------------------------------------------------


def call(*, safe: bool, content: object = None) -> Call[Any]:
    return Call("GET", "/x", lambda answer: answer["data"]["x"], safe=safe, content=content)


def test_only_what_is_safe_is_sent_again_and_not_for_ever() -> None:
    for status in (None, 502, 503, 504):
        assert Retries(2).pause_s(call(safe=False), status=status) is None
        retries = Retries(2)
        first = retries.pause_s(call(safe=True), status=status)
        second = retries.pause_s(call(safe=True), status=status)
        assert first is not None
        assert second is not None
        assert 0.05 <= first <= 0.15 <= second <= 0.45
        assert retries.pause_s(call(safe=True), status=status) is None
    for status in (400, 404, 409, 500):
        assert Retries(2).pause_s(call(safe=True), status=status) is None
    # Too many requests: nothing was done. What was asked for is waited, but not for hours.
    again = Retries(9)
    assert (again.pause_s(call(safe=False), status=429, retry_after="3") or 0) >= 3
    assert again.pause_s(call(safe=False), status=429, retry_after="99999") == 30
    assert (again.pause_s(call(safe=False), status=429, retry_after="soon") or 99) < 30
    # A body that was read once is not there a second time.
    assert again.pause_s(call(safe=True, content=iter([b""])), status=429) is None


@pytest.mark.parametrize(
    "body", [b"", b"<html>x</html>", b"{", b"[]", b"null", b'{"data": 1}', b'{"data": {}}', b"\xff"]
)
def test_an_answer_of_somebody_else_is_told_as_such(body: bytes) -> None:
    with pytest.raises(sdk.ApiError, match="makes no sense") as caught:
        result_of(call(safe=True), 200, body, json.loads)
    assert caught.value.code == "unknown"
    refused = refusal_of(502, body, json.loads)
    assert isinstance(refused, sdk.UnavailableError)
    assert "502" in refused.message


def test_errors_are_of_the_kind_that_the_server_means() -> None:
    for status, kind in (
        (400, sdk.BadRequestError), (401, sdk.UnauthorizedError), (404, sdk.NotFoundError),
        (402, sdk.InsufficientCreditsError), (403, sdk.ForbiddenError), (409, sdk.ConflictError),
        (429, sdk.RateLimitedError), (501, sdk.NotImplementedYetError), (418, sdk.ApiError),
    ):  # fmt: skip
        said = {"code": "x", "message": "m", "requestId": "req_1", "details": {"field": "f"}}
        error = refusal_of(status, json.dumps({"error": said}).encode(), json.loads)
        assert type(error) is kind
        assert (error.code, error.request_id, error.details) == ("x", "req_1", {"field": "f"})


def test_a_create_has_a_key_so_that_it_makes_one_sandbox() -> None:
    one, two = calls.create(None, 0, None, {}), calls.create("t", 0, "mine", {"name": "n"})
    assert len(one.headers["Idempotency-Key"]) == 36
    assert two.headers == {"Idempotency-Key": "mine"}
    assert two.body == {"template": "t", "name": "n"}
    assert calls.sandbox_path("a/b ü", "exec") == "/v1/sandboxes/a%2Fb%20%C3%BC/exec"


# --- streams --------------------------------------------------------------------------------------


def event(name: str, data: object, number: int | None = None) -> list[str]:
    head = [] if number is None else [f"id: {number}"]
    return [*head, f"event: {name}", f"data: {json.dumps(data)}", ""]


def fed(following: Any, *lines: str) -> list[Any]:
    return [one for one in map(following.feed, lines) if one is not None]


def test_output_goes_on_where_it_broke_off() -> None:
    following = Following("/p", 5)
    assert following.query == {"encoding": "base64", "offset": 5}
    said = {"stream": "stdout", "data": "aGk="}
    lines = [*event("output", said, 7), ": alive", "", *event("newer", {}, 7)]
    assert fed(following, *lines) == [Printed("stdout", b"hi")]
    fed(following, "id: 9", "event: output")  # and there it breaks
    assert following.broke(OSError("gone")) == 0.2
    assert following.query["offset"] == 7
    assert fed(following, *event("lost", {"bytes": 3}, 10)) == [Lost(3)]
    assert following.broke(OSError("gone")) == 0.2  # something was heard in between
    for _ in range(4):
        assert following.ended() <= 4
    with pytest.raises(sdk.ConnectionFailedError):
        following.ended()
    end = {"exitCode": 3, "signal": None, "timedOut": False}
    assert fed(following, *event("exit", end)) == [Exited(3, None, False)]
    assert following.is_over


@pytest.mark.parametrize("data", ["{", "[]", "{}", '"x"', '{"stream": "stdout", "data": "%"}'])
def test_events_that_make_no_sense_are_a_broken_connection(data: str) -> None:
    with pytest.raises(sdk.ConnectionFailedError):
        fed(Following("/p", 0), "event: output", f"data: {data}", "")
    with pytest.raises((sdk.ConnectionFailedError, sdk.ApiError)):
        fed(Following("/p", 0), "event: error", f"data: {data}", "")


def test_the_last_event_tells_why_it_is_over_and_a_gap_in_a_watch_is_told() -> None:
    watching = Watching("/f", "/d", "root", recursive=True)
    assert watching.began() == []
    change = {"type": "moved", "path": "/d/b", "from": "/d/a", "folder": False}
    assert fed(watching, *event("change", change)) == [FileChange("moved", "/d/b", False, "/d/a")]
    assert watching.began() == [FileChange("overflow", "/d", True)]
    gone = {"code": "not_found", "message": "gone", "details": {"reason": "absent"}}
    with pytest.raises(sdk.NotFoundError) as caught:
        fed(watching, *event("error", gone))
    assert caught.value.details == {"reason": "absent"}
    assert watching.is_over


@given(st.text(), st.lists(st.integers(1, 9)))
def test_text_is_told_whole_however_it_is_cut(text: str, cuts: list[int]) -> None:
    told: list[str] = []
    heard, data, at = Heard(told.append, None), text.encode(errors="replace"), 0
    for size in cuts:
        heard.feed(Printed("stdout", data[at : at + size]))
        at += size
    heard.feed(Printed("stdout", data[at:]))
    heard.feed(Exited(0, None, False))
    assert "".join(told) == data.decode()
    assert heard.result().stdout_bytes == data


# --- code that is kept ----------------------------------------------------------------------------


class Interpreter:
    """What a sandbox would run, here."""

    def __init__(self, language: str) -> None:
        self._language = language

    @contextmanager
    def running(self) -> Iterator["Interpreter"]:
        argv = code.argv_of(self._language)
        argv = [sys.executable, *argv[1:]] if self._language == "python" else argv
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as self.process:
            yield self
            assert self.process.stdin is not None
            self.process.stdin.close()

    def run(self, text: str) -> CodeResult:
        return asyncio.run(self._run(code.Piece(text)))

    async def _run(self, piece: code.Piece) -> CodeResult:
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(piece.request())
        stdin.flush()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[ProcessEvent] = asyncio.Queue()

        def hear(name: str, stream: Any) -> None:
            data = stream.read1(7)  # cut wherever it likes
            if data:
                events.put_nowait(Printed(name, data))
            else:
                loop.remove_reader(stream)
                events.put_nowait(Exited(self.process.wait(), None, False))

        shown = {"stdout": b"", "stderr": b""}
        streams = (("stdout", self.process.stdout), ("stderr", self.process.stderr))
        for name, stream in streams:
            assert stream is not None
            loop.add_reader(stream, hear, name, stream)
        try:
            async with asyncio.timeout(20):
                while not piece.is_done:
                    event = await events.get()
                    piece.feed(event)
                    if isinstance(event, Printed):
                        shown[event.stream] += piece.new_text(event.stream)
        finally:
            for _, stream in streams:
                assert stream is not None
                loop.remove_reader(stream)
        result = piece.result()
        assert shown["stdout"].decode(errors="replace") == result.stdout
        assert shown["stderr"].decode(errors="replace") == result.stderr
        return result


def test_python_is_kept_between_pieces() -> None:
    with Interpreter("python").running() as python:
        assert python.run("x = 40\nx + 2") == CodeResult("", "", "42", None)
        done = python.run("import sys\nprint('hü', x)\nprint('e', file=sys.stderr)\nNone")
        assert done == CodeResult("hü 40\n", "e\n", None, None)
        assert python.run("def f(n):\n    return n * x\nf(2)").value == "80"
        assert python.run("_ + 1").value == "81"
        assert python.run("import asyncio\nawait asyncio.sleep(0, 'slept')").value == "'slept'"
        assert python.run("import sys; sys.stdin.read()").value == "''"
        assert python.run("").value is None
        done = python.run("1\ndef g():\n    raise KeyError('no ü')\ng()")
        assert done.error is not None
        assert (done.error.name, done.error.message) == ("KeyError", "'no ü'")
        assert "raise KeyError('no ü')" in done.error.traceback
        assert "runpy" not in done.error.traceback
        for text, name in (("x = (", "SyntaxError"), ("exit(3)", "SystemExit"), ("1/0", "ZeroDi")):
            error = python.run(text).error
            assert error is not None
            assert error.name.startswith(name)
        assert python.run("print('\\0' * 3 + 'x'); '\\0'").stdout == "\0\0\0x\n"
        assert len(python.run("'x' * 5_000_000").value or "") == 1_000_000
        assert python.run("import pickle\nclass A: pass\npickle.loads(pickle.dumps(A())).__class__"
                          ).value == "<class '__main__.A'>"  # fmt: skip
        with pytest.raises(code.SessionEndedError, match="exit code 5"):
            python.run("import os; print('last words', file=sys.stderr, flush=True); os._exit(5)")


@pytest.mark.skipif(not shutil.which("node"), reason="NOT RUN: there is no node here")
def test_javascript_is_kept_between_pieces() -> None:
    with Interpreter("node").running() as node:
        assert node.run("const x = 40; x + 2").value == "42"
        assert node.run("console.log('hü', x); console.error('e')").stdout == "hü 40\n"
        assert node.run("await Promise.resolve(7); x").error is None
        assert node.run("Promise.resolve({a: 1})").value == "{ a: 1 }"
        assert node.run("require('os').EOL").value == "'\\n'"
        for text, name in (("nope", "ReferenceError"), ("x = (", "SyntaxError")):
            error = node.run(text).error
            assert error is not None
            assert error.name == name
        assert node.run("throw 'just text'").error is not None
        assert node.run("'é\\0'").value == "'é\\x00'"
        with pytest.raises(code.SessionEndedError):
            node.run("process.exit(5)")


def test_what_is_lost_or_too_much_is_told_and_the_next_piece_begins_where_it_begins() -> None:
    piece = code.Piece("x")
    mark = b"\0" + piece.mark.encode()
    for event in (
        Printed("stdout", b"a" * calls.SAID_MAX), Printed("stdout", b"b" * calls.SAID_MAX),
        Printed("stdout", b"c\0not the mark"), Printed("stderr", mark + b"\0"),
    ):  # fmt: skip
        piece.feed(event)
        assert piece.new_text("stdout") in (b"", getattr(event, "data", b""))
    assert not piece.is_done
    for byte in mark + b'["5", null]\0':
        piece.feed(Printed("stdout", bytes((byte,))))
    done = piece.result()
    assert (done.value, done.truncated) == ("5", True)
    assert len(done.stdout) <= calls.SAID_MAX + 100
    assert done.stdout.endswith("c\0not the mark")
    assert calls.length_of(Lost(7)) == 7
    assert calls.length_of(Printed("stdout", b"abc")) == 3


def test_a_child_of_a_piece_answers_nobody() -> None:
    with Interpreter("python").running() as python:
        text = "import os, sys\nif os.fork() == 0: sys.exit()\nos.wait()[1]"
        assert python.run(text).value == "0"
        for what, ended in (
            ("sys.exit(3)", 3),
            ("1/0", 1),
            ("sys.exit('why')", 1),
            ("sys.exit()", 0),
        ):
            text = f"if os.fork() == 0: {what}\nos.waitstatus_to_exitcode(os.wait()[1])"
            assert python.run(text).value == str(ended), what
        assert python.run("6 * 7").value == "42"


@pytest.mark.skipif(not shutil.which("node"), reason="NOT RUN: there is no node here")
def test_javascript_runs_once_whatever_it_throws() -> None:
    with Interpreter("node").running() as node:
        node.run("globalThis.n = 0")
        failed = node.run("n += 1; JSON.parse('await {')").error
        assert failed is not None
        assert failed.name == "SyntaxError"
        assert node.run("n").value == "1"
        assert node.run("await Promise.resolve(42)").value == "42"
        assert node.run("throw Object.create(null)").error is not None
        assert node.run("n").value == "1"


def test_a_connection_that_was_good_for_a_while_counts_no_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    following = Following("/p", 0)
    for _ in range(20):  # a weekend of silence, with a brief break now and then
        following.began()
        now[0] += 60
        assert following.ended() == 0.2
    for _ in range(4):
        following.began()
        following.ended()
    with pytest.raises(sdk.ConnectionFailedError):
        following.ended()


def test_what_is_downloaded_is_written_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    with archives.written(tmp_path / "link") as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with archives.written(tmp_path / "pipe") as file:
        file.write(b"through it")
    assert os.read(reader, 99) == b"through it"
    os.close(reader)
    with pytest.raises(OSError, match="broken off"), archives.written(tmp_path / "real") as file:
        raise OSError("broken off")
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "real"]
    assert (tmp_path / "real").read_text() == "after"


def test_two_that_write_to_one_place_do_not_meet_and_take_no_neighbours_name(
    tmp_path: Path,
) -> None:
    (tmp_path / ".n.part").write_text("somebody's")
    with archives.written(tmp_path / "n") as first, archives.written(tmp_path / "n") as second:
        first.write(b"A" * 20)
        second.write(b"B" * 5)
    assert (tmp_path / "n").read_bytes() == b"A" * 20  # whoever ends last
    assert (tmp_path / ".n.part").read_text() == "somebody's"
    long = tmp_path / ("x" * 255)
    with archives.written(long) as file:
        file.write(b"long")
    assert long.read_bytes() == b"long"
    assert len(os.listdir(tmp_path)) == 3


def archive_of(*members: tuple[tarfile.TarInfo, bytes]) -> Iterator[bytes]:
    """Return an archive as a sandbox may send it: anything at all."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return iter([written.getvalue()])


def member(name: str, *, link: str = "", kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    found.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return found


def test_an_archive_writes_nothing_outside_its_folder(tmp_path: Path) -> None:
    """As in CVE-2025-4517: a link whose way is longer than realpath(3) follows."""
    folder, members, path = "d" * 247, [], ""
    for number in range(16):
        members.append((member(f"{path}{folder}", kind=tarfile.DIRTYPE), b""))
        members.append((member(f"{path}{number:x}", link=folder, kind=tarfile.SYMTYPE), b""))
        path += f"{folder}/"
    short = "/".join(f"{number:x}" for number in range(16))
    members.append((member(f"{short}/l", link="../" * 16, kind=tarfile.SYMTYPE), b""))
    members.append((member("out", link=f"{short}/l/../..", kind=tarfile.SYMTYPE), b""))
    members.append((member("out/owned"), b"owned"))
    target = tmp_path / "a/b/target"
    with pytest.raises(TransferError):
        archives.unpack(archive_of(*members), target, "it")
    found = [one for one in tmp_path.rglob("owned") if not one.is_relative_to(target)]
    assert found == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a"]
    assert os.listdir(tmp_path / "a/b") == ["target"]


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    """Return a header alone, which says that so many bytes follow."""
    found = member(name, kind=kind)
    found.size = size
    return found.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 512)


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line) + len(str(len(line) + 3))
        lines += str(length).encode() + line
    return header(tarfile.XHDTYPE, len(lines)) + padded(lines)


LONG_NAME = header(tarfile.GNUTYPE_LONGNAME, 5) + padded(b"name\0")
MAP_OF_HOLES = pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="f")
HOSTILE = {
    "a pax header of 8 GiB": itertools.chain(
        [header(tarfile.XHDTYPE, 8 << 30)], itertools.repeat(bytes(1 << 20), 8192)
    ),
    "a name of 1 GiB": itertools.chain(
        [header(tarfile.GNUTYPE_LONGNAME, 1 << 30)], itertools.repeat(bytes(1 << 20), 1024)
    ),
    "3000 names, one behind the other": iter([LONG_NAME * 3000]),
    "3000 pax headers": iter([pax(a="b") * 3000]),
    "a map of holes without end": itertools.chain(
        [MAP_OF_HOLES, header(tarfile.REGTYPE, 8 << 30), b"9" * 18 + b"\n"],
        itertools.repeat(b"1\n" * 4096, 100_000),
    ),
    "an old map of holes": iter([header(tarfile.GNUTYPE_SPARSE, 512) + bytes(1024)]),
    "links to nothing": itertools.chain(
        [header(tarfile.LNKTYPE, 0, "l")],
        (pax(comment="c" * 100_000) + header(tarfile.REGTYPE, 0) for _ in range(600)),
    ),
    "a link where a folder is": iter([
        header(tarfile.DIRTYPE, 0, "x") + member("x", link="y", kind=tarfile.SYMTYPE).tobuf(),
    ]),
    "a file larger than the disk": iter([header(tarfile.REGTYPE, 1 << 50) + bytes(1024)]),
    "folders without bottom": iter([header(tarfile.DIRTYPE, 0, "d/" * 45) * 1, *(
        pax(path="d/" * n + "d") + header(tarfile.DIRTYPE, 0) for n in (100, 255, 256)
    )]),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_an_archive_takes_neither_memory_nor_disk_without_bound(what: str, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TransferError, match="cannot copy it here"):
            archives.unpack(HOSTILE[what], tmp_path / "to", "it")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 32 << 20
    assert sum(one.lstat().st_size for one in tmp_path.rglob("*") if one.is_file()) == 0


def test_an_archive_of_many_entries_does_not_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(count: int) -> Iterator[bytes]:
        for number in range(count):
            yield header(tarfile.REGTYPE, 0, f"{number % 10}")
        yield bytes(1024)

    monkeypatch.setattr(archives, "_ENTRIES_MAX", 2000)
    archives.unpack(files(2000), tmp_path, "it")
    with pytest.raises(TransferError, match="more than 2000"):
        archives.unpack(files(2001), tmp_path, "it")
    monkeypatch.setattr(archives, "_NAMES_MAX", 100)
    with pytest.raises(TransferError, match="names"):
        archives.unpack(files(101), tmp_path, "it")


def test_a_long_name_with_attributes_is_unpacked(tmp_path: Path) -> None:
    name = "/".join(["d" * 100] * 20) + "/ü\udcff"
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        written = io.BytesIO()
        with tarfile.open(fileobj=written, mode="w", format=format_) as archive:
            found = member(name)
            found.size, found.pax_headers = 3, {"SCHILY.xattr.user.note": "n" * 60_000}
            found.mtime = 1.5
            archive.addfile(found, io.BytesIO(b"all"))
        archives.unpack(iter([written.getvalue()]), tmp_path / str(format_), "it")
        assert (tmp_path / str(format_) / name).read_bytes() == b"all"


def test_an_archive_goes_through_no_link_and_takes_the_place_of_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").write_text("kept")
    target = tmp_path / "target"
    target.mkdir()
    (target / "folder").symlink_to(tmp_path / "elsewhere")
    (target / "out").symlink_to(tmp_path / "elsewhere/file")
    (target / "other").write_text("kept")
    (target / "file").symlink_to("other")
    for refused in (
        [(member("out"), b"out of here")],
        [(member("folder/file"), b"through a link of mine")],
        [(member("in", link="folder/file", kind=tarfile.LNKTYPE), b"")],
        [(member("in", link="file", kind=tarfile.LNKTYPE), b"")],
        [(member("../elsewhere/file"), b"up")],
    ):
        with pytest.raises(TransferError):
            archives.unpack(archive_of(*refused), target, "it")
    honest = [
        (member("plain", kind=tarfile.DIRTYPE), b""),
        (member("plain/one"), b"1"),
        (member("plain/two", link="plain/one", kind=tarfile.LNKTYPE), b""),
        (member("plain/three", link="one", kind=tarfile.SYMTYPE), b""),
        (member("file"), b"new"),
    ]
    for _ in range(2):  # also where it is there already
        archives.unpack(archive_of(*honest), target, "it")
        assert (target / "plain/two").read_text() == (target / "plain/three").read_text() == "1"
        assert (target / "file").read_text() == "new"
    assert (tmp_path / "elsewhere/file").read_text() == "kept"
    assert (target / "other").read_text() == "kept"


def test_of_a_link_to_a_folder_the_folder_is_packed(tmp_path: Path) -> None:
    (tmp_path / "release-7").mkdir()
    (tmp_path / "release-7/a").write_text("a")
    (tmp_path / "current").symlink_to("release-7")
    with (
        archives.packed(tmp_path / "current") as packed,
        tarfile.open(fileobj=packed, mode="r|") as archive,
    ):
        assert [one.name for one in archive] == [".", "./a"]


def test_a_part_is_cut_out_of_what_came() -> None:
    for status, offset, length, wanted in (
        (206, 3, 4, b"0123"), (200, 3, 4, b"3456"), (200, 0, None, b"0123456789"),
        (200, 12, 4, b""), (206, 3, None, b"0123456789"), (200, 3, 0, b""),
    ):  # fmt: skip
        part = calls.Part(status, offset, length)
        assert b"".join(part.cut(b"%d" % n) for n in range(10)) == wanted
        assert part.is_whole is (length is not None and len(wanted) == length)


def test_names_of_any_bytes_are_sent_as_they_are() -> None:
    odd = os.fsdecode(b"/a\xff")
    assert calls.read_file("/f", odd, "root").query["pathBase64"] == "L2H/"
    assert calls.transfer("/f", "move", odd, "b", "root", overwrite=False).body == {
        "fromBase64": "L2H/", "to": "b", "overwrite": False, "user": "root",
    }  # fmt: skip
    assert calls.sandbox_path(os.fsdecode(b"\xff")) == "/v1/sandboxes/%FF"
    for seconds in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="time-out"):
            calls.milliseconds(seconds)


def test_options_are_fields_of_the_api_and_no_misspelling_passes() -> None:
    made = calls.create(
        "t", 1, None, {"idle_timeout": 5, "vcpus": 2, "memory": "1GB", "name": None}
    )
    assert made.body == {
        "template": "t", "idleTimeout": 5, "resources": {"vcpus": 2, "memory": "1GB"},
    }  # fmt: skip
    both = calls.create(None, 1, None, {"sshKeys": [], "resources": {"vcpus": 1}, "disk": "9GB"})
    assert both.body == {"sshKeys": [], "resources": {"vcpus": 1, "disk": "9GB"}}
    assert calls.change("s", {"onExpiry": "pause"}).body == {"onExpiry": "pause"}
    started = calls.start("/p", "x", {"cwd": PurePosixPath("/tmp"), "stdin": True})
    assert started.body == {"command": "x", "cwd": "/tmp", "stdin": True}
    with pytest.raises(TypeError, match="no option 'nmae'; did you mean 'name'"):
        calls.create(None, 1, None, {"nmae": "x"})
    with pytest.raises(TypeError, match="there are cwd, env, "):
        calls.start("/p", "x", {"zzz": 1})
    with pytest.raises(TypeError, match="no option 'env'"):
        calls.change("s", {"env": {}})


def test_a_language_that_is_not_there_is_refused() -> None:
    assert code.argv_of("js") == code.argv_of("node")
    with pytest.raises(ValueError, match="python, node"):
        code.argv_of("cobol")
