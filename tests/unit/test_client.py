"""The SDK without a server: what it asks, how it reads answers, when it asks again."""

import errno
import inspect
import io
import itertools
import json
import os
import pydoc
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sandyard
import sandyard.client as sdk
from sandyard.client import archives, calls, contexts
from sandyard.client._async.network import AsyncFormerNames
from sandyard.client._sync.transport import Transport
from sandyard.client.calls import Call, Heard, Retries, refusal_of, result_of
from sandyard.client.config import (
    ClientConfig,
    ConfigError,
    find_config,
    known_key,
    remove_config,
    write_config,
)
from sandyard.client.errors import TransferError
from sandyard.client.models import Exited, FileChange, Lost, Printed
from sandyard.client.options import ChangeOptions, CreateOptions, ListOptions, ProcessOptions
from sandyard.client.streams import Following, Watching

ROOT = Path(__file__).parents[2]
PAIRS = [
    (sdk.Sandyard, sdk.AsyncSandyard), (sdk.Sandbox, sdk.AsyncSandbox),
    (sdk.Files, sdk.AsyncFiles), (sdk.Process, sdk.AsyncProcess), (sdk.Desktop, sdk.AsyncDesktop),
    (sdk.Processes, sdk.AsyncProcesses), (sdk.Contexts, sdk.AsyncContexts),
    (sdk.Context, sdk.AsyncContext), (sdk.Network, sdk.AsyncNetwork),
    (sdk.WorkspaceFiles, sdk.AsyncWorkspaceFiles), (sdk.Terminal, sdk.AsyncTerminal),
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


def test_the_synchronous_client_is_what_is_generated_from_the_other() -> None:
    script = ROOT / "scripts/unasync"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_answer_that_nothing_has_changed_is_a_refusal_unless_it_was_asked_for() -> None:
    with Transport(ClientConfig("http://sandyard.test", "sk_x"), retries=0) as transport:
        answers = httpx.MockTransport(lambda _: httpx.Response(304))
        with httpx.Client(base_url="http://sandyard.test", transport=answers) as transport._http:
            with pytest.raises(sdk.ApiError) as refused:
                transport.send(Call("GET", "/v1/me", dict))
            assert refused.value.status == 304
            assert transport.send_raw(Call("GET", "/v1/me", dict)) is None


def test_a_synchronous_module_that_is_not_generated_is_named(tmp_path: Path) -> None:
    for folder in ("scripts", "src/sandyard/client"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    sync = tmp_path / "src/sandyard/client/_sync"
    command = [sys.executable, str(tmp_path / "scripts/unasync")]
    generated = (sync / "files.py").read_text()
    (sync / "files.py").write_text(generated.partition("\n")[2])  # without its first line
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (done.returncode, "files.py" in done.stderr) == (1, True), done.stderr
    subprocess.run(command, check=True)
    assert (sync / "files.py").read_text() == generated
    (sync / "other.py").write_text(generated)
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (done.returncode, "other.py" in done.stderr) == (1, True), done.stderr


def test_a_sandbox_has_not_more_methods_than_a_page_of_help_can_show() -> None:
    offered = inspect.getmembers(sdk.AsyncSandbox, inspect.isroutine)
    former = vars(AsyncFormerNames)
    methods = [one for one, _ in offered if not one.startswith("_") and one not in former]
    assert len(methods) <= 30


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (sdk.Sandbox.create, CreateOptions), (sdk.AsyncSandbox.create, CreateOptions),
        (sdk.Sandyard.create, CreateOptions), (sdk.Sandbox.change, ChangeOptions),
        (sdk.AsyncSandyard.list, ListOptions), (sdk.Processes.start, ProcessOptions),
    ],
)  # fmt: skip
def test_help_shows_each_option(function: Callable[..., object], options: type) -> None:
    shown = pydoc.plain(pydoc.render_doc(function))
    assert [name for name in options.__annotations__ if f"{name}: " not in shown] == []
    assert "**" not in shown


def test_a_process_has_a_pid_unless_it_was_looked_up_by_tag() -> None:
    with sdk.Sandyard("rt_live_x", "http://127.0.0.1:1") as client:
        processes = client.processes("box")
        assert processes.get(42).pid == processes.get("42").pid == 42
        assert (processes.get("web").pid, processes.get("web").name) == (None, "web")


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


def test_the_command_line_imports_nothing_that_one_command_needs() -> None:
    unwanted = ("sandyard.client._async", "sandyard.server", "websockets", "importlib.metadata")
    look = (
        f"import sandyard.cli.main, sys; print([one for one in {unwanted} if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_of_the_asynchronous_client_are_found_when_they_are_used() -> None:
    look = (
        "import sys, sandyard.client as sdk\n"
        "assert 'sandyard.client._async' not in sys.modules\n"
        "assert set(sdk.__all__) <= set(dir(sdk))\n"
        "assert all(getattr(sdk, one) is getattr(sdk, one) for one in sdk.__all__)\n"
        "assert not hasattr(sdk, 'AsyncNothing')\n"
    )
    subprocess.run([sys.executable, "-c", look], check=True)


def test_the_package_offers_all_names_of_its_client() -> None:
    assert {one for one in dir(sandyard) if not one.startswith("__")} == set(sdk.__all__)
    for name in sdk.__all__:
        assert getattr(sandyard, name) is getattr(sdk, name)
    with pytest.raises(AttributeError, match="no attribute 'Sandboxx'"):
        sandyard.Sandboxx  # type: ignore[attr-defined]  # noqa: B018


# --- where the server is --------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("SANDYARD_URL", "SANDYARD_API_KEY", "SANDYARD_PROFILE"):
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
    with pytest.raises(ConfigError, match="repair it"):
        find_config(None, None)
    for key, url in (("rt_live_x", "host:1"), ("rt_live_ü", "http://a"), ("a\nb", "http://a")):
        with pytest.raises(ConfigError):
            find_config(key, url)


def test_profiles_are_kept_apart_and_what_is_replaced_is_copied(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nowhere / "sandyard/config.toml"
    first, second = ClientConfig("http://a:1", "rt_live_a"), ClientConfig("http://b:2", "rt_live_b")
    assert write_config(first) is None
    assert write_config(first) is None, "nothing is lost"
    before = path.read_text()
    copy = write_config(second)
    assert copy is not None
    assert (copy.read_text(), copy.stat().st_mode & 0o777) == (before, 0o600)
    monkeypatch.setenv("SANDYARD_PROFILE", "other")
    with pytest.raises(ConfigError, match="there is no profile 'other'"):
        find_config(None, None)
    assert write_config(first) is None
    assert find_config(None, None) == first
    assert known_key("http://b:2") == "rt_live_b"
    assert known_key("http://c:3") is None
    monkeypatch.setenv("SANDYARD_URL", "http://env:3")
    assert find_config(None, None) == ClientConfig("http://env:3", "rt_live_a")
    assert find_config(None, None, "other") == first, "the parameter wins"
    monkeypatch.delenv("SANDYARD_URL")
    remove_config()
    with pytest.raises(ConfigError):
        find_config(None, None)
    monkeypatch.delenv("SANDYARD_PROFILE")
    assert find_config(None, None) == second
    path.write_text("not = [toml")
    copy = write_config(first)
    assert copy is not None
    assert copy.read_text() == "not = [toml"
    remove_config()
    assert not path.exists()
    monkeypatch.setenv("SANDYARD_PROFILE", "a b")
    with pytest.raises(ConfigError, match="its name has letters"):
        write_config(first)


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
    heard.callbacks.call()
    assert "".join(told) == data.decode()
    assert heard.result().stdout_bytes == data


def test_a_server_may_be_away_for_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def away(following: Following, *, ends: bool = False) -> float:
        """Return for how long it is tried again; with `ends` it connects, and ends at once."""
        began = now[0]
        with pytest.raises(sdk.ConnectionFailedError):
            while True:
                if ends:
                    following.began()
                now[0] += following.ended()
        return now[0] - began

    assert 7 < away(Following("/p", 0)) < 9  # it was never there
    following = Following("/p", 0)
    for _ in range(20):  # a weekend of silence, with a brief break now and then
        following.began()
        now[0] += 60
        assert following.ended() == 0.2
    assert 110 < away(following) < 125
    following = Following("/p", 0)
    following.began()
    fed(following, ": alive")
    assert 110 < away(following) < 125
    assert 110 < away(Following("/p", 0), ends=True) < 125


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
    assert os.listdir(tmp_path / "a/b") == []


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


def test_the_name_of_a_link_leads_nowhere_else(tmp_path: Path) -> None:
    """As above, with the links themselves: a name with `..` behind a link."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("kept")
    target = tmp_path / "target"
    deep, members = "", []
    while len(deep) + len(str(target)) < 3850:
        deep += f"{'d' * 100}/"
        members.append((member(deep, kind=tarfile.DIRTYPE), b""))
    members += [
        (member(f"{deep}s", kind=tarfile.DIRTYPE), b""),
        (member("j", link=f"{deep}s", kind=tarfile.SYMTYPE), b""),
        (member(f"j/../{'L' * 255}", link=str(home), kind=tarfile.SYMTYPE), b""),
        (member(f"j/../{'L' * 255}/.bashrc", link="/dev/null", kind=tarfile.SYMTYPE), b""),
    ]
    with pytest.raises(TransferError):
        archives.unpack(archive_of(*members), target, "it")
    assert (home / ".bashrc").read_text() == "kept"
    assert not target.exists()


def test_what_a_callback_raises_is_not_taken_for_an_error_of_the_server() -> None:
    def fails(_: object) -> None:
        raise ValueError("mine")

    for made, event_ in (
        (Heard(fails, None), Printed("stdout", b"x")),
        (Heard(None, fails), Printed("stderr", b"x")),
    ):
        made.feed(event_)
        with pytest.raises(ValueError, match="mine"):
            made.callbacks.call()
    for name, data in (("stdout", {"text": "x"}), ("result", {"text": "1", "isMain": True})):
        run = contexts.Running(fails, fails, fails)
        fed(run, *event(name, data))
        with pytest.raises(ValueError, match="mine"):
            run.callbacks.call()

    async def waits(_: object) -> None:
        raise AssertionError

    run = contexts.Running(waits, None, None)
    fed(run, *event("stdout", {"text": "x"}))
    with pytest.raises(TypeError, match="AsyncSandbox"):
        run.callbacks.call()


def test_links_stay_links_and_nothing_is_written_through_them(tmp_path: Path) -> None:
    def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
        return member(name, link=target, kind=tarfile.SYMTYPE), b""

    (tmp_path / "outside").write_text("kept")
    members = [
        (member("bin", kind=tarfile.DIRTYPE), b""),
        link("bin/python", "/usr/bin/python3"), link("bin/gone", "nowhere"),
        link("bin/own", "/workspace/env/lib/one"), link("bin/up", "../lib/one"),
        link("bin/self", "/workspace/env"), link("bin/near", "/workspace/environment"),
        link("out", f"{tmp_path}/outside"), link("above", "../../x"),
        (member("lib/one"), b"1"),
    ]  # fmt: skip
    target = tmp_path / "env"
    for _ in range(2):  # also where it is there already
        left = archives.unpack(archive_of(*members), target, "env")
        assert {one.path: one.target for one in left} == {
            "bin/python": "/usr/bin/python3", "bin/near": "/workspace/environment",
            "out": f"{tmp_path}/outside", "above": "../../x",
        }  # fmt: skip
        assert os.readlink(target / "bin/python") == "/usr/bin/python3"
        assert os.readlink(target / "bin/gone") == "nowhere"
        assert os.readlink(target / "bin/own") == "../lib/one"
        assert os.readlink(target / "bin/self") == ".."
        assert (target / "bin/up").read_text() == "1"
    for through in ([link("d", str(tmp_path)), (member("d/outside"), b"x")],
                    [link("f", f"{tmp_path}/outside"), (member("f"), b"x")],
                    [link("d", ".."), link("d/e", "x")]):  # fmt: skip
        with pytest.raises(TransferError):
            archives.unpack(archive_of(*through), tmp_path / "new", "env")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "outside").read_text() == "kept"
    broken = [(member("whole"), b"1"), (member("../no"), b"")]
    with pytest.raises(TransferError, match="what came before that is in"):
        archives.unpack(archive_of(*broken), target, "env")
    assert sorted(os.listdir(tmp_path)) == ["env", "outside"]


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
    started = calls.start("/p", "x", None, {"cwd": PurePosixPath("/tmp"), "stdin": True})
    assert started.body == {"command": "x", "cwd": "/tmp", "stdin": True}
    with pytest.raises(TypeError, match="no option 'nmae'; did you mean 'name'"):
        calls.create(None, 1, None, {"nmae": "x"})
    with pytest.raises(TypeError, match="there are cwd, env, "):
        calls.start("/p", "x", None, {"zzz": 1})
    with pytest.raises(TypeError, match="no option 'env'"):
        calls.change("s", {"env": {}})


def test_languages_have_their_usual_names() -> None:
    names = {
        one: contexts.name_of(one) for one in ("js", "JavaScript", "node", "sh", "py", "cobol")
    }
    assert names == {
        "js": "node", "JavaScript": "node", "node": "node", "sh": "bash", "py": "python",
        "cobol": "cobol",
    }  # fmt: skip


def test_what_code_reports_is_collected() -> None:
    told: list[object] = []
    run = contexts.Running(told.append, None, told.append)
    lines = [
        *event("stdout", {"text": "é"}), *event("stderr", {"text": "e"}),
        *event("result", {"text": "x", "png": "aGk=", "isMain": False, "truncated": False}),
        *event("result", {"text": "5", "isMain": True, "truncated": True}),
        *event("newer", {}),
        *event("error", {"name": "E", "value": "v", "traceback": "t"}),
    ]  # fmt: skip
    fed(run, *lines)
    run.callbacks.call()
    assert not run.is_over
    fed(run, *event("end", {}))
    done = run.result()
    assert (done.stdout, done.stderr, done.value, done.truncated) == ("é", "e", "5", True)
    assert done.error == sdk.CodeError("E", "v", "t")
    assert (done.results[0].png, done.results[0].html) == (b"hi", None)
    assert told == ["é", *done.results]
    with pytest.raises(sdk.ConflictError):
        fed(run, *event("error", {"code": "invalid_state", "message": "paused"}))


@pytest.mark.parametrize(
    ("reason", "status", "own", "python"),
    [
        ("absent", 404, sdk.NotFoundError, FileNotFoundError),
        ("no_process", 404, sdk.NotFoundError, ProcessLookupError),
        ("denied", 403, sdk.ForbiddenError, PermissionError),
        ("exists", 409, sdk.ConflictError, FileExistsError),
        ("is_a_folder", 400, sdk.BadRequestError, IsADirectoryError),
        ("not_a_folder", 400, sdk.BadRequestError, NotADirectoryError),
        ("no_space", 409, sdk.ConflictError, OSError),
    ],
)
def test_errors_about_files_are_pythons_too(
    reason: str, status: int, own: type[sdk.ApiError], python: type[OSError]
) -> None:
    error = sdk.errors.error_of(
        "/a: it is so", status=status, code="x", request_id="r", details={"reason": reason}
    )
    assert isinstance(error, own)
    assert isinstance(error, python)
    assert (str(error), error.message, error.status) == ("/a: it is so", "/a: it is so", status)
    assert issubclass(sdk.StillStartingError, sdk.NotReadyError | TimeoutError)
    assert issubclass(sdk.TimedOutError, TimeoutError)
    assert issubclass(sdk.ConnectionFailedError, ConnectionError)


def test_a_full_disk_has_its_number() -> None:
    error = sdk.errors.error_of(
        "/a: full", status=409, code="conflict", request_id="r", details={"reason": "no_space"}
    )
    assert isinstance(error, sdk.NoSpaceError)
    assert (error.errno, str(error)) == (errno.ENOSPC, "/a: full")


def test_a_result_is_shown_with_the_beginning_of_its_output() -> None:
    done = sdk.ExecResult(b"hello\n", b"", 0, 5, False, False)
    assert repr(done) == r"ExecResult(exit_code=0, stdout='hello\n')"
    failed = sdk.ExecResult(b"x" * 300, b"\xff!", 7, 5, True, False)
    shown = "x" * 200 + "…"
    assert repr(failed) == (
        f"ExecResult(exit_code=7, stdout={shown!r}, stderr='\ufffd!', timed_out=True)"
    )
