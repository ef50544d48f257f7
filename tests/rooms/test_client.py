"""The SDK against a server on fake machines, and against servers that behave badly."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import anyio
import httpx
import pytest
from tests.support.door import Door, door
from tests.support.house import EACH_STORE, store_section
from tests.support.ports import free_port

from sandyard.client import (
    ApiError,
    AsyncSandbox,
    AsyncSandyard,
    ConnectionFailedError,
    Exited,
    FileChange,
    NotFoundError,
    NotReadyError,
    Printed,
    RateLimitedError,
    Sandbox,
    Sandyard,
    UnauthorizedError,
    UnavailableError,
)
from sandyard.server.core.node_ops import Report
from sandyard.server.fakes.driver import Conduct

T = TypeVar("T")


@pytest.fixture
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Door]:
    async with (
        store_section(getattr(request, "param", "sqlite")) as store,
        door(tmp_path, saves=True, store=store) as made,
    ):
        yield made


async def concurrently(work: Callable[[], T]) -> T:
    """Do what blocks in a thread: the server is on this loop."""
    return await asyncio.to_thread(work)


def yard_of(opened: Door, key: str | None = None) -> Sandyard:
    return Sandyard(key or opened.yard.key, f"http://127.0.0.1:{opened.port}")


def async_yard_of(opened: Door) -> AsyncSandyard:
    return AsyncSandyard(opened.yard.key, f"http://127.0.0.1:{opened.port}/v1/")


heard: list[str] = []


async def hear(text: str) -> None:
    await asyncio.sleep(0)
    heard.append(text)


async def test_a_sandboxs_life_from_threads(opened: Door, tmp_path: Path) -> None:
    def live() -> None:
        with yard_of(opened) as yard:
            with Sandbox.create(client=yard, name="mine", env={"A": "1"}) as box:
                assert box.status == "running"
                assert (box.name, box.template) == ("mine", "base-ubuntu")
                assert box.id in repr(box)
                assert box.exec("hello").stdout == str(box.exec("hello")) == "hello"
                assert box.exec(["a b", "c"]).stdout == "'a b' c"
                assert [one.id for one in yard.list(status="running")] == [box.id]
                assert Sandbox.connect("mine", client=yard).id == box.id
                box.files.write("d/f", "hällo")
                assert box.files.read_text(PurePosixPath("/workspace/d/f")) == "hällo"
                box.files.write(PurePosixPath("d/odd"), b"\xff")
                with pytest.raises(UnicodeDecodeError):
                    box.files.read_text("d/odd")
                assert box.files.read_text("d/odd", errors="replace") == "\ufffd"
                with pytest.raises(TypeError, match="NoneType"):
                    box.files.write("d/none", None)  # type: ignore[arg-type]  # the mistake
                with pytest.raises(ApiError, match="names a directory"):
                    box.files.write("/tmp/zz/", "x")
                assert [one.path for one in box.files.list(PurePosixPath("d"))] == [
                    "/workspace/d/f", "/workspace/d/odd",
                ]  # fmt: skip
                box.files.upload(Path(__file__), "/up.py")
                box.files.download("/up.py", tmp_path / "down.py")
                assert (tmp_path / "down.py").read_bytes() == Path(__file__).read_bytes()
                url = box.files.sign("/up.py").url
                assert "signature=" in url
                with pytest.raises(NotFoundError) as caught:
                    box.files.read("none")
                assert caught.value.details["reason"] == "absent"
                events = list(box.run("cat", stdin="x" * 200_000))
                assert sum(len(e.data) for e in events if isinstance(e, Printed)) == 200_000
                assert events[-1] == Exited(0, None, False)
                told: list[str] = []
                done = box.exec("count 3", on_stdout=told.append)
                assert "".join(told) == done.stdout == "1\n2\n3\n"
                with pytest.raises(TypeError, match="AsyncSandbox"):
                    box.exec("count 3", on_stdout=hear)
                assert box.exec("hello", timeout_s=None).stdout.strip() == "hello"
                for limit_s in (None, 600.0, 20.0):
                    found = yard.execute(box.id, "hello", timeout_s=limit_s)
                    assert repr(found).startswith("ExecResult(exit_code=0, stdout='hello")
                with pytest.raises(ValueError, match="time-out"):
                    box.exec("hello", timeout_s=0)
                for _ in box.run("cat", stdin=b"once", timeout_s=60):
                    break  # what nobody hears to its end is ended
                assert all(one.status == "exited" for one in box.processes.list())
                saved = box.snapshot("then")
                assert [one.id for one in yard.snapshots()] == [saved.id]
                (twin,) = box.fork(name="twin")
                assert twin.wait_until_ready().name == "twin"
                twin.delete()
                assert box.pause().status == "paused"
                assert box.resume().status == "running"
                assert box.change(tags=["t"]).raw["tags"] == ["t"]
                assert box.touch().id == box.id
                assert box.stats()["memoryTotalBytes"] > 0
                cost = box.cost()
                assert (cost.is_free, cost.hourly_dollars > 0) == (False, True)
                assert isinstance(box.logs(), str)
                assert box.roll_back("then").wait_until_ready().status == "running"
                yard.delete_snapshot("then")
            assert list(yard.list()) == []
            assert any(one.slug == "base-ubuntu" for one in yard.templates())
            assert yard.ask("GET", "/v1/me")["data"]
            assert yard.credits()["balanceCents"] > 0
            assert yard.usage("7d")["period"] == "7d"
            with pytest.raises(NotFoundError):
                box.refresh()
            with Sandbox.create(client=yard) as brief:
                brief.delete()  # by itself, in the middle
            many = [yard.create(wait_s=0).id for _ in range(3)]
            assert {one.id for one in yard.list()} == set(many)
        with yard_of(opened, "rt_live_" + "x" * 32) as stranger, pytest.raises(UnauthorizedError):
            stranger.get("mine")

    await concurrently(live)


async def test_a_sandboxs_life_on_a_loop(opened: Door, tmp_path: Path) -> None:
    async with async_yard_of(opened) as yard:
        async with await AsyncSandbox.create(client=yard, name="mine") as box:
            assert (await box.exec("hello", check=True)).stdout == "hello"
            assert [one.id async for one in yard.list()] == [box.id]
            await box.files.write("f", "x")
            await box.files.upload(Path(__file__), "/up.py")
            await box.files.download("/up.py", tmp_path / "down.py")
            assert (tmp_path / "down.py").read_bytes() == Path(__file__).read_bytes()
            assert [one.name for one in await box.files.list()] == ["f"]
            events = [one async for one in box.run("cat", stdin="x" * 200_000)]
            assert sum(len(e.data) for e in events if isinstance(e, Printed)) == 200_000
            told: list[str] = []
            await box.exec("count 3", on_stdout=told.append)
            assert "".join(told) == "1\n2\n3\n"
            heard.clear()
            await box.exec("count 3", on_stdout=hear)
            assert "".join(heard) == "1\n2\n3\n"
            (twin,) = await box.fork()
            await twin.delete()
            assert (await box.pause()).status == "paused"
            assert (await box.resume()).status == "running"
            await box.snapshot("then")
            assert [one.name async for one in yard.snapshots()] == ["then"]
            seen = []
            async for now in yard.statuses("mine"):
                seen.append(now.status)
                if len(seen) == 1:
                    await box.pause()
                if now.status == "paused":
                    break
            assert seen[0] == "running"
            await (await AsyncSandbox.connect("mine", client=yard)).delete()
        assert [one async for one in yard.list()] == []


async def test_a_block_deletes_only_what_it_created(opened: Door) -> None:
    def live() -> None:
        with yard_of(opened) as yard:
            made = yard.create(name="kept")
            with Sandbox.connect("kept", client=yard), yard.get("kept"):
                pass
            assert [one.id for one in yard.list()] == [made.id]
            (fork,) = made.fork()
            with fork, made:
                pass
            assert list(yard.list()) == []

    await concurrently(live)
    async with async_yard_of(opened) as yard:
        made = await yard.create(name="kept")
        async with await AsyncSandbox.connect("kept", client=yard), await yard.get("kept"):
            pass
        assert [one.id async for one in yard.list()] == [made.id]
        (fork,) = await made.fork()
        async with fork, made:
            pass
        assert [one async for one in yard.list()] == []


async def test_a_watch_tells_from_when_it_is_asked(opened: Door) -> None:
    async with async_yard_of(opened) as yard, await AsyncSandbox.create(client=yard) as box:
        changes = box.files.watch("/workspace", recursive=True)
        first = asyncio.ensure_future(anext(changes))
        for number in range(1000):
            await box.files.write("f", "x")
            await asyncio.sleep(0.01)
            if first.done():
                break
            assert number < 999
        assert await first in (
            FileChange("created", "/workspace/f", False),
            FileChange("modified", "/workspace/f", False),
        )
        with pytest.raises(ApiError) as caught:
            await box.pause()
            async for _ in changes:
                pass
        assert caught.value.details == {"status": "paused"}


async def test_what_does_not_come_up_and_what_does_not_end_well_is_told(
    tmp_path: Path,
) -> None:
    async with door(tmp_path, conduct=Conduct(starts=False)) as opened:

        def fail() -> None:
            with yard_of(opened) as yard, pytest.raises(NotReadyError, match="failed"):
                Sandbox.create(client=yard)
            with yard_of(opened) as yard:
                assert list(yard.list()) == []  # what did not come up is not left behind

        await concurrently(fail)
    # Nor is one whose making was broken off before its answer came.
    async with (
        door(tmp_path / "slow", conduct=Conduct(start_delay_s=0.5)) as opened,
        async_yard_of(opened) as yard,
    ):
        making = asyncio.ensure_future(AsyncSandbox.create(client=yard))
        while not [one async for one in yard.list()]:
            await asyncio.sleep(0.01)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert [one async for one in yard.list()] == []


# --- servers that behave badly --------------------------------------------------------------------

Answers = list[bytes | None]
BOX = {
    "id": "sandbox-abcdefghijkl", "name": None, "status": "running", "template": "base-ubuntu",
    "createdAt": "2026-05-06T10:00:00.000Z", "statusReason": None,
}  # fmt: skip
GOOD = json.dumps({"data": BOX, "meta": {}}).encode()
BUSY = json.dumps({"error": {"code": "unavailable", "message": "busy", "requestId": "r"}}).encode()


def answer(status: int, body: bytes, *, length: int | None = None, head: str = "") -> bytes:
    length = len(body) if length is None else length
    start = f"HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n"
    return f"{start}{head}\r\n".encode() + body


@asynccontextmanager
async def bad_server(*answers: bytes | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer each request with the next of these, None by closing; the last for ever."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            for line in head.split(b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    await reader.readexactly(int(line.split(b":")[1]))
            said = answers[min(len(asked), len(answers) - 1)]
            asked.append(head)
            if said is not None:
                writer.write(said)
                await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    port = free_port()
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        yield f"http://127.0.0.1:{port}", asked


async def looping(url: str, work: Callable[[Any], Any]) -> Any:
    async with AsyncSandyard("rt_live_x", url) as yard:
        return await work(yard)


async def both(url: str, work: Callable[[Any], Any]) -> list[Any]:
    """Do the same with both clients, and return what came of it, or what was raised."""
    outcomes = []
    for one in (concurrently(lambda: one_call(url, work)), looping(url, work)):
        try:
            outcomes.append(await one)
        except Exception as error:  # noqa: BLE001 - it is what the test looks at
            outcomes.append(error)
    return outcomes


def one_call(url: str, work: Callable[[Sandyard], T]) -> T:
    with Sandyard("rt_live_x", url) as yard:
        return work(yard)


def get(yard: Any) -> Awaitable[Any]:
    found: Awaitable[Any] = yard.get("x")
    return found


async def test_what_passes_is_waited_for_and_nobody_notices() -> None:
    for trouble in (answer(503, BUSY), answer(502, b"<html>"), None, answer(200, b"{", length=9)):
        for is_looping in (False, True):
            async with bad_server(trouble, answer(200, GOOD)) as (url, asked):
                if is_looping:
                    one = await looping(url, get)
                else:
                    one = await concurrently(partial(one_call, url, get))
                assert one.id == BOX["id"], trouble
                assert len(asked) == 2, trouble
    busy = answer(429, BUSY, head="Retry-After: 0\r\n")
    async with bad_server(busy, busy, answer(200, GOOD)) as (url, asked):
        made = await concurrently(lambda: one_call(url, lambda yard: yard.create()))
        assert made.status == "running"
        keys = {line for one in asked for line in one.lower().split(b"\r\n") if b"idemp" in line}
        assert (len(asked), len(keys)) == (3, 1)  # the same sandbox, whatever became of the first


async def test_a_piece_of_code_is_run_once_or_told_of() -> None:
    made = json.dumps({"data": {"id": "context-python-1", "language": "python"}}).encode()
    async with bad_server(answer(200, GOOD), answer(201, made), answer(503, BUSY)) as (url, asked):

        def run(yard: Sandyard) -> None:
            yard.get("x").run_code("pay()")

        with pytest.raises(UnavailableError):
            await concurrently(lambda: one_call(url, run))
        assert [one.split(b" ")[1].rpartition(b"/")[2] for one in asked] == [
            b"x", b"contexts", b"run",
        ]  # fmt: skip


async def test_a_sandbox_of_a_key_of_ones_own_is_never_deleted_for_not_running(
    opened: Door,
) -> None:
    async with async_yard_of(opened) as yard:
        box = await AsyncSandbox.create(client=yard, idempotency_key="mine")
        await box.pause()

        def again() -> None:
            with yard_of(opened) as other:
                Sandbox.create(client=other, idempotency_key="mine", wait_s=0.2)

        with pytest.raises(NotReadyError, match="paused"):
            await concurrently(again)
        with pytest.raises(NotReadyError, match="paused"):
            await AsyncSandbox.create(client=yard, idempotency_key="mine", wait_s=0.2)
        assert (await box.refresh()).status == "paused"


async def test_what_was_begun_is_ended_whoever_cancels_it(opened: Door) -> None:
    async with async_yard_of(opened) as yard:
        box = await yard.create()
        scope = anyio.CancelScope()

        async def cancel_once_it_is_followed() -> None:
            while not any(
                one.is_used for one in (await opened.yard.house.node.do(Report())).machines
            ):
                await asyncio.sleep(0.01)
            scope.cancel()

        cancelling = asyncio.ensure_future(cancel_once_it_is_followed())
        with scope:
            async for _ in box.run("hang"):
                pass
        await cancelling
        assert [one.status for one in await box.processes.list()] == ["exited"]
        with anyio.move_on_after(0.3):
            async with await AsyncSandbox.create(client=yard):
                await anyio.sleep(60)
        assert [one.id async for one in yard.list()] == [box.id]


async def test_a_cancelled_copy_ends_with_the_piece_that_is_on_its_way(
    opened: Door, tmp_path: Path
) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(60 * 2**20)
    told: list[int] = []
    async with async_yard_of(opened) as yard, await AsyncSandbox.create(client=yard) as box:
        copying = asyncio.ensure_future(
            box.files.upload(tmp_path / "large", "/large", on_progress=told.append)
        )
        while not told:
            await asyncio.sleep(0)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
        count = len(told)
        with pytest.raises(NotFoundError):
            await box.files.info("/large")
        assert len(told) <= count + 1


async def test_a_server_that_is_slow_is_waited_for() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in answer(200, GOOD):
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    port = free_port()
    async with await asyncio.start_server(serve, "127.0.0.1", port):
        for outcome in await both(f"http://127.0.0.1:{port}", get):
            assert outcome.id == BOX["id"]


async def test_what_does_not_pass_is_told_in_a_sentence() -> None:
    html = answer(200, b"<html>hello</html>")
    for said, kind, words in (
        (answer(429, BUSY, head="Retry-After: 0\r\n"), RateLimitedError, "busy"),
        (None, ConnectionFailedError, "cannot reach"),
        (b"no HTTP at all\r\n\r\n", ConnectionFailedError, "cannot reach"),
        (html, ApiError, "makes no sense"), (answer(200, b"{}"), ApiError, "makes no sense"),
        (answer(200, GOOD[:9]), ApiError, "makes no sense"),
    ):  # fmt: skip
        async with bad_server(said) as (url, _):
            for outcome in await both(url, get):
                assert isinstance(outcome, kind), outcome
                assert words in str(outcome)
    for outcome in await both("http://127.0.0.1:1", get):
        assert isinstance(outcome, ConnectionFailedError)


async def test_what_may_have_been_done_is_not_done_again() -> None:
    async with bad_server(None) as (url, asked):
        for outcome in await both(url, lambda yard: yard.execute("x", "reboot")):
            assert isinstance(outcome, ConnectionFailedError)
        assert len(asked) == 2
    async with bad_server(answer(503, BUSY)) as (url, asked):
        await both(url, lambda yard: yard.delete("x"))
        assert len(asked) == 2
    # What was refused for haste was not done.
    busy = answer(429, BUSY, head="Retry-After: 0\r\n")
    async with bad_server(busy, busy, answer(200, GOOD)) as (url, asked):
        await concurrently(lambda: one_call(url, lambda yard: yard.delete("x")))
        assert len(asked) == 3


INJECT = [{"host": "a.test", "headers": {"X-Key": "k ${TOKEN}"}}]


@pytest.mark.parametrize("opened", EACH_STORE, indirect=True)
async def test_secrets_and_network_rules(opened: Door) -> None:
    with yard_of(opened) as yard:
        made = await concurrently(lambda: yard.add_secret("token", "hidden-1", ["a.test"]))
        assert (made.name, made.hosts, made.last_used_at) == ("TOKEN", ("a.test",), None)
        with pytest.raises(ApiError, match="there is one of that name"):
            await concurrently(lambda: yard.add_secret("TOKEN", "hidden-1", ["a.test"]))
        box = await concurrently(
            lambda: yard.create("base-minimal", network={"inject": INJECT}, wait_s=20)
        )
        assert (await concurrently(box.network.rules))["inject"] == INJECT
        rules = await concurrently(
            lambda: box.network.replace(egress="deny", allow=["a.test"], inspect=["b.test"])
        )
        assert (rules["egress"], rules["inspect"], rules["inject"]) == ("deny", ["b.test"], [])
        assert await concurrently(box.network.connections) == []
        changed = await concurrently(lambda: yard.replace_secret("Token", hosts=["*.a.test"]))
        assert changed.hosts == ("*.a.test",)
        assert [one.name for one in await concurrently(yard.secrets)] == ["TOKEN"]
        await concurrently(lambda: yard.delete_secret("TOKEN"))
    async with async_yard_of(opened) as yard:
        await yard.add_secret("TOKEN", "hidden-2", ["a.test"])
        assert (await yard.replace_secret("TOKEN", "hidden-3")).name == "TOKEN"
        box_ = await yard.get(box.id)
        assert (await box_.network.replace(inject=INJECT))["inject"] == INJECT
        assert (await box_.network.rules())["egress"] == "allow"
        assert await box_.network.connections() == []
        with pytest.warns(DeprecationWarning, match=r"use `network\.replace`"):
            assert (await box_.set_network(egress="deny"))["egress"] == "deny"
        with pytest.warns(DeprecationWarning, match=r"use `network\.rules\(\)`"):
            assert (await box_.network())["egress"] == "deny"
        with pytest.warns(DeprecationWarning, match=r"use `network\.connections`"):
            assert await box_.connections() == []
        assert len(await yard.secrets()) == 1
        await yard.delete_secret("TOKEN")
        with pytest.raises(NotFoundError):
            await yard.delete_secret("TOKEN")


@pytest.mark.parametrize("opened", EACH_STORE, indirect=True)
async def test_the_command_line_keeps_secrets_and_rules(opened: Door, tmp_path: Path) -> None:
    environment = os.environ | {
        "SANDYARD_URL": f"http://127.0.0.1:{opened.port}", "SANDYARD_API_KEY": opened.yard.key,
        "HOME": str(tmp_path), "COLUMNS": "200",
    }  # fmt: skip

    async def run(*words: str, stdin: str = "", ends: int = 0) -> str:
        command = [str(Path(sys.executable).parent / "sandyard"), *words]
        done = await concurrently(
            lambda: subprocess.run(
                command, env=environment, input=stdin, capture_output=True, text=True, timeout=60
            )
        )
        assert done.returncode == ends, (done.stdout, done.stderr)
        return done.stdout + done.stderr

    assert "--host" in await run("secret", "set", "TOKEN", stdin="hidden-1\n", ends=2)
    said = await run("secret", "set", "token", "--host", "a.test", stdin="hidden-1\n")
    assert said == "set TOKEN\n"
    inject = ("--inject", "a.test:X-Key: k ${TOKEN}", "--inject", "a.test:X-Other:v:w")
    await run(
        "sandbox", "create", "--template", "base-minimal", "--name", "ruled", "--deny-all",
        "--allow", "a.test", *inject,
    )  # fmt: skip
    said = await run("sandbox", "network", "ruled")
    assert "inject   a.test  X-Key: k ${TOKEN}\ninject   a.test  X-Other: v:w\n" in said
    assert "deny   everything else" in said
    assert "all earlier rules go" in await run("sandbox", "network", "ruled", *inject, ends=2)
    assert "HOST:HEADER:VALUE" in await run(
        "sandbox", "network", "ruled", "--allow-all", "--inject", "a.test", ends=2
    )
    said = await run("sandbox", "network", "ruled", "--allow-all", "--inspect", "b.test")
    assert "inspect  b.test" in said
    value = tmp_path / "value"
    value.write_text("hidden-2\n")
    await run("secret", "set", "TOKEN", "--value-file", str(value))
    said = await run("secret", "list")
    assert "TOKEN" in said
    assert "a.test" in said
    assert "hidden" not in said
    await run("secret", "delete", "token")
    assert "check its name" in await run("secret", "delete", "token", ends=1)
    [folder] = tmp_path.glob("**/machines/machine-*")
    line = {"time": time.time(), "verdict": "refused", "rule": "egress", "name": "c.test"}
    (folder / "egress-1.log").write_text(json.dumps(line) + "\n")
    assert "refused  c.test:0  (egress)" in await run("sandbox", "egress", "ruled")
    # And by an event, over a connection that stays open.
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {opened.yard.key}"}) as client:
        url = f"http://127.0.0.1:{opened.port}/v1/sandboxes/ruled/egress"
        async with client.stream("GET", url, params={"follow": "true"}, timeout=20) as answer:
            lines = answer.aiter_lines()
            async with asyncio.timeout(20):
                while "c.test" not in (await anext(lines)):
                    pass
                later = {**line, "time": time.time() + 1, "name": "d.test"}
                with (folder / "egress-1.log").open("a") as file:
                    file.write(json.dumps(later) + "\n")
                while "d.test" not in (await anext(lines)):
                    pass
