"""The SDK with real machines."""

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.server import RealServer, is_slow, longer, some, wait_until

from sandyard.client import (
    ApiError,
    AsyncSandbox,
    AsyncSandyard,
    ChangedError,
    CommandFailedError,
    ConflictError,
    Exited,
    Lost,
    NotFoundError,
    Printed,
    Sandbox,
    Sandyard,
)

pytestmark = pytest.mark.machine


def key_of(server: RealServer) -> str:
    config = (server.home / "xdg/sandyard/config.toml").read_text()
    return config.split('api_key = "')[1].split('"')[0]


@pytest.fixture
def yard(server: RealServer) -> Iterator[Sandyard]:
    with Sandyard(key_of(server), f"http://127.0.0.1:{server.port}") as made:
        yield made


@pytest.fixture
def sbx(yard: Sandyard, box: str) -> Sandbox:
    return Sandbox.connect(box, client=yard)


@pytest.mark.core
def test_a_sandbox_of_ones_own(server: RealServer, yard: Sandyard) -> None:
    with Sandbox.create("base-minimal", client=yard, wait_s=int(longer(60))) as sbx:
        assert sbx.exec("python3 -c 'print(40+2)'", timeout_s=longer(30)).stdout == "42\n"
        assert sbx.exec(["printf", "%s|", "a b", "$HOME"]).stdout == "a b|$HOME|"
        with pytest.raises(CommandFailedError, match="no such thing") as caught:
            sbx.exec("echo no such thing >&2; exit 7", check=True)
        assert caught.value.exit_code == 7
        told: list[str] = []
        done = sbx.exec(
            "echo é; echo bad >&2; exit 3", on_stdout=told.append, on_stderr=told.append
        )
        assert (done.exit_code, done.stdout, done.stderr) == (3, "é\n", "bad\n")
        assert sorted(told) == ["bad\n", "é\n"]
        late = sbx.exec("sleep 60", timeout_s=0.5, on_stdout=told.append)
        assert (late.timed_out, late.exit_code) == (True, 124)
    assert sbx.id not in [one.id for one in yard.list()]


@pytest.mark.core
def test_a_command_is_the_same_whether_its_output_is_followed_or_not(
    server: RealServer, sbx: Sandbox
) -> None:
    many = ["printf", "%s.", *map(str, range(2000))]
    long = f"echo 'it''s {'é' * 600_000}' | wc -m; echo $0; exit 5"
    sbx.files.write("/tmp/plain", "x")
    for command, options in (
        ("echo out; echo err >&2; exit 3", {}), ("no-such-program a", {}),
        (["no-such-program", "a b"], {}), (["/tmp/plain"], {}), ("kill -KILL $$", {}),
        ("cat; id -un", {"stdin": "in", "user": "nobody"}), (many, {}), (long, {}),
        (long, {"user": "nobody"}), ("pwd; echo $A", {"cwd": "/tmp", "env": {"A": "é"}}),
        ("sleep 30", {"timeout_s": 0.5}), ("echo 1", {"timeout_s": None}),
        ("echo 1", {"timeout_s": 7200}), ("if", {}),
    ):  # fmt: skip
        given: dict[str, Any] = {"timeout_s": longer(60), **options}
        quiet = sbx.exec(command, **given)
        told: list[str] = []
        loud = sbx.exec(command, **given, on_stdout=told.append, on_stderr=told.append)
        what = str(command)[:60]
        for name in ("stdout", "stderr", "exit_code", "timed_out", "truncated"):
            assert getattr(quiet, name) == getattr(loud, name), f"{name} of {what}"
        assert sorted("".join(told)) == sorted(str(loud)), what
    assert sbx.exec(["no-such-program"]).exit_code == 127
    assert sbx.exec(["/tmp/plain"]).exit_code == 126
    assert sbx.exec(long).stdout == "600005\n" + sbx.exec("echo $0").stdout
    assert ".sandyard" not in sbx.exec("ls -A /tmp").stdout


def test_what_is_read_and_printed_is_exact_however_much_it_is(
    server: RealServer, sbx: Sandbox
) -> None:
    data = os.urandom(some(8_000_000))
    digest, errors, end = hashlib.sha256(), b"", None
    for event in sbx.run("cat; echo done >&2; exit 9", stdin=data):
        match event:
            case Printed(stream="stdout", data=piece):
                digest.update(piece)
            case Printed(data=piece):
                errors += piece
            case Exited():
                end = event
            case Lost():
                raise AssertionError("something was lost")
    assert digest.digest() == hashlib.sha256(data).digest()
    assert (errors, end) == (b"done\n", Exited(9, None, False))
    # What nobody hears any more is ended, with all that it started.
    for event in sbx.run("sleep 1001 & echo $$; sleep 1001"):
        assert isinstance(event, Printed)
        wait_until(lambda: server.running(sbx.id).count("sleep 1001 ") == 2)
        break
    wait_until(lambda: "sleep 1001 " not in server.running(sbx.id))


def test_code_is_kept_and_ended_when_it_takes_too_long(sbx: Sandbox) -> None:
    assert sbx.run_code("x = 41").error is None
    told: list[str] = []
    done = sbx.run_code("print('hü'); x + 1", on_stdout=told.append)
    assert (done.value, done.stdout, "".join(told)) == ("42", "hü\n", "hü\n")
    failed = sbx.run_code("1/0").error
    assert failed is not None
    assert failed.name == "ZeroDivisionError"
    assert sbx.run_code("open('/workspace/made', 'w').write('x'); x").value == "41"
    late = sbx.run_code("import time; print('on', flush=True); time.sleep(99)", timeout_s=1.5)
    assert late.error is not None
    assert (late.error.name, late.stdout) == ("TimeoutError", "on\n")
    assert sbx.run_code("x").value == "41"
    assert sbx.run_code("input() + input()", stdin="a\nb").value == "'ab'"
    # What goes on after an interruption ends with the interpreter.
    stubborn = "while True:\n try: time.sleep(99)\n except KeyboardInterrupt: pass"
    late = sbx.run_code(f"import time\n{stubborn}", timeout_s=1.5)
    assert late.error is not None
    assert late.error.name == "TimeoutError"
    gone = sbx.run_code("x").error
    assert gone is not None
    assert gone.name == "NameError"
    ended = sbx.run_code("import os; os._exit(3)").error
    assert ended is not None
    assert ended.name == "InterpreterEnded"
    # One that is ended behind its back has a successor.
    pid = sbx.run_code("import os; os.getpid()").value
    assert sbx.exec(f"kill -9 {pid}").exit_code == 0
    assert sbx.run_code("2 + 2").value in ("4", None)
    again = sbx.run_code("import os; os.getpid()").value
    assert again not in (pid, None)
    sbx.exec("rm -f /workspace/made")
    for one in sbx.contexts.list():
        one.delete()


def test_a_context_is_anybodys_who_has_its_id(sbx: Sandbox, yard: Sandyard) -> None:
    before = {one.id for one in sbx.contexts.list()}  # other tests run code in this sandbox, too
    context = sbx.contexts.create("bash", cwd="/", user="nobody")
    assert context.run("x=5; id -un; pwd").stdout == "nobody\n/\n"
    other = Sandbox.connect(sbx.id, client=yard)
    assert {one.id for one in other.contexts.list()} - before == {context.id}
    assert other.run_code("echo $x; cat", context=context.id, stdin="in").stdout == "5\nin"
    failed = other.run_code("sleep 999", context=context, timeout_s=1).error
    assert failed is not None
    assert failed.name == "TimeoutError"
    context.restart()
    assert context.run("echo [$x]").stdout == "[]\n"
    context.delete()
    with pytest.raises(NotFoundError):
        context.run("true")
    assert context.id not in {one.id for one in other.contexts.list()}


def test_what_a_cancelled_call_has_started_is_ended(server: RealServer, box: str) -> None:
    async def cancel() -> None:
        async with AsyncSandyard(key_of(server), f"http://127.0.0.1:{server.port}") as yard:
            sbx = await AsyncSandbox.connect(box, client=yard)
            for command, stdin in (("sleep 1003", None), ("cat; sleep 1003", b"x")):
                running = asyncio.ensure_future(sbx.exec(command, timeout_s=300, stdin=stdin))
                await asyncio.to_thread(wait_until, lambda: "sleep 1003 " in server.running(box))
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                await asyncio.to_thread(
                    wait_until, lambda: "sleep 1003 " not in server.running(box)
                )
            code, on = "import time; x = 1; print('on'); time.sleep(1004)", asyncio.Event()
            coding = asyncio.ensure_future(
                sbx.run_code(code, timeout_s=longer(60), on_stdout=lambda _: on.set())
            )
            await on.wait()
            coding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await coding
            assert (await sbx.run_code("x")).value == "1"

    asyncio.run(cancel())


def test_programs_in_the_background_and_on_terminals(sbx: Sandbox, server: RealServer) -> None:
    process = sbx.exec(
        "pwd; id -u; exec sleep 1005", background=True, cwd="made/here", make_cwd=True, user=12345
    )
    events = process.events()
    said = b""
    while said.count(b"\n") < 2:
        event = next(events)
        assert isinstance(event, Printed)
        said += event.data
    assert said == b"/workspace/made/here\n12345\n"
    process.kill()
    assert process.wait().signal == "SIGKILL"
    process.kill()  # once more is no error
    shown: list[bytes] = []
    terminal = sbx.open_terminal(shown.append, "stty size; cat", columns=100, rows=30)
    terminal.write("typed\n")
    wait_until(lambda: b"".join(shown).count(b"typed") == 2)
    terminal.write(b"\x04")
    assert terminal.wait(longer(30)).exit_code == 0
    assert b"30 100" in b"".join(shown)
    with pytest.raises(TimeoutError):
        sbx.open_terminal(shown.append, "sleep 1006").wait(0.1)
    sbx.exec("pkill -f 'sleep 1006'; rm -r made")


def test_files_on_conditions_and_watched(sbx: Sandbox) -> None:
    assert not sbx.files.exists("cond")
    sbx.files.write("cond", "one")
    etag = sbx.files.info("cond").etag
    assert etag is not None
    assert sbx.files.read_if_changed("cond", etag) is None
    sbx.files.write("cond", "two", if_match=etag)
    with pytest.raises(ChangedError, match="has changed"):
        sbx.files.write("cond", "thr", if_match=etag)
    assert sbx.files.read_if_changed("cond", etag) == b"two"
    sbx.exec("ln -s cond link")
    assert sbx.files.info("link").etag is None  # its target may change while it does not
    etag = sbx.files.info("cond").etag
    assert etag is not None
    assert sbx.files.read_if_changed("link", etag) is None
    sbx.files.write("link", "three", if_match=etag)
    assert sbx.files.read_if_changed("link", etag) == b"three"
    assert sbx.exec("readlink link").stdout == "cond\n"
    with pytest.raises(ChangedError):
        sbx.files.write("none", "x", if_match="*")
    assert not sbx.files.exists("none")
    assert not sbx.files.exists("cond/below")
    seen: list[str] = []
    watch = sbx.files.on_change("/workspace", lambda change: seen.append(change.path))
    sbx.files.write_all({"a1": "1", "sub/a2": b"2"})
    wait_until(lambda: {"/workspace/a1", "/workspace/sub"} <= set(seen))
    watch.stop()
    assert watch.error is None
    with pytest.raises(FileNotFoundError):
        sbx.files.on_change("/absent", print)
    sbx.exec("rm -r cond a1 sub")


@pytest.mark.parametrize(
    ("options", "reason", "field"),
    [
        ({"user": "nosuch"}, "no_user", "user"), ({"cwd": "/no/such"}, "no_cwd", "cwd"),
        ({"command": ["/no/such"]}, "cannot_start", "command"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_has_a_reason(
    sbx: Sandbox, options: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(ApiError) as caught:
        sbx.processes.start(**{"command": "true", **options})
    assert caught.value.details["reason"] == reason
    assert caught.value.details["field"] == field
    with pytest.raises(ProcessLookupError):
        sbx.processes.get(999_999).info()


def test_a_session_lives_through_a_pause_and_goes_with_a_fork(yard: Sandyard) -> None:
    with Sandbox.create("base-minimal", client=yard, wait_s=int(longer(60))) as sbx:
        sbx.run_code("x = 'kept'")
        sbx.pause()
        assert sbx.run_code("x").value == "'kept'"  # resumed, and it knows
        (twin,) = sbx.fork(name="twin")
        with twin.wait_until_ready(longer(60)):
            assert twin.run_code("'own'").value == "'own'"
            assert twin.exec("hostname").stdout == "twin\n"
        followed = sbx.run("echo one; sleep 1000")
        assert next(followed) == Printed("stdout", b"one\n")
        pausing = threading.Timer(0.2, sbx.pause)
        pausing.start()
        with pytest.raises(ConflictError) as caught:
            next(followed)
        pausing.join()
        assert caught.value.details == {"status": "paused"}


def test_folders_go_and_come_and_are_watched(sbx: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "up/deep").mkdir(parents=True)
    (tmp_path / "up/deep/f").write_bytes(os.urandom(some(2_000_000)))
    counted: list[int] = []
    sbx.files.upload(tmp_path / "up", "/tmp/sdk", on_progress=counted.append)
    assert sum(counted) >= some(2_000_000)
    sbx.files.download("/tmp/sdk", tmp_path / "down")
    assert (tmp_path / "down/deep/f").read_bytes() == (tmp_path / "up/deep/f").read_bytes()
    found: list[str] = []
    is_heard = threading.Event()

    def watch() -> None:
        try:
            for change in sbx.files.watch("/tmp/sdk", recursive=True):
                found.append(f"{change.type} {change.path}")
                is_heard.set()
        except ApiError as error:
            found.append(str(error.details["reason"]))

    watching = threading.Thread(target=watch)
    watching.start()
    for number in range(200):
        sbx.files.write(f"/tmp/sdk/deep/{number}", "x")
        if is_heard.wait(0.05):
            break
    sbx.files.remove("/tmp/sdk", recursive=True)
    watching.join(longer(30))
    assert found[-1] == "absent"
    assert any(one.startswith("created /tmp/sdk/deep/") for one in found)


@pytest.mark.whole_memory
def test_many_at_once_on_a_loop(server: RealServer, box: str) -> None:
    async def all_of_it() -> None:
        key, url = key_of(server), f"http://127.0.0.1:{server.port}"
        async with AsyncSandyard(key, url) as yard:
            sbx = await AsyncSandbox.connect(box, client=yard)
            count = 4 if is_slow() else 16
            async with asyncio.TaskGroup() as tasks:
                all_done = [tasks.create_task(sbx.exec(f"echo {n}")) for n in range(count)]
            assert [one.result().stdout for one in all_done] == [f"{n}\n" for n in range(count)]
            assert (await sbx.run_code("import sys; 6 * 7")).value == "42"
            late = await sbx.run_code("while True: pass", timeout_s=1.5)
            assert late.error is not None
            assert late.error.name == "TimeoutError"
            own = await AsyncSandbox.create("base-minimal", client=yard, wait_s=int(longer(60)))
            async with own:
                done = await own.exec("cat", stdin=b"\0\xff")
                assert done.stdout_bytes == b"\0\xff"
            with pytest.raises(ApiError):
                await own.refresh()

    asyncio.run(all_of_it())
