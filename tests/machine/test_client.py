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
    CommandFailedError,
    ConflictError,
    Exited,
    Lost,
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
    gone = sbx.run_code("x").error
    assert gone is not None
    assert gone.name == "NameError"
    ended = sbx.run_code("import os; os._exit(3)").error
    assert ended is not None
    assert ended.name == "SessionEnded"
    # One that is ended behind its back is begun anew.
    pid = sbx.run_code("import os; os.getpid()").value
    assert sbx.exec(f"kill -9 {pid}").exit_code == 0
    assert sbx.run_code("2 + 2").value in ("4", None)
    again = sbx.run_code("import os; os.getpid()").value
    assert again not in (pid, None)
    sbx.exec(f"kill -9 {again}; rm -f /workspace/made")


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
