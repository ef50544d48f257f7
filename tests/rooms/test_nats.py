"""Words by NATS on bad days: servers that die or hang, nodes that say what they may not."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nats.aio.client import Client
from tests.support.nats import NatsServer, nats_server
from tests.support.nodes import FakeNode, a_wish

from sandyard.server.core.contracts.node import MachineFact, NodeReport, Phase
from sandyard.server.core.errors import DeadlineExceededError, InternalError, UnavailableError
from sandyard.server.core.ids import new_sandbox_id
from sandyard.server.core.node_ops import (
    EnsureGone,
    EnsureRunning,
    ReadConsole,
    Report,
    WithdrawWorkspace,
)
from sandyard.server.links.nats import client, messages, server
from sandyard.server.links.nats import link as link_module
from sandyard.server.links.nats.client import Inbox, RemoteNode
from sandyard.server.links.nats.link import PREFIX, Link, NatsMessage, linked
from sandyard.server.links.nats.server import answering
from sandyard.server.links.nats.tokens import Key, Role, name_of, public_of


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path / "nats") as running:
        yield running


@asynccontextmanager
async def a_control(nats: NatsServer, name: str = "one") -> AsyncIterator[tuple[Link, Inbox]]:
    link = nats.control_link(name)
    inbox = Inbox(link, name)
    async with linked(link):
        await up(link)
        yield link, inbox


@asynccontextmanager
async def a_node(nats: NatsServer, node: FakeNode, **options: Any) -> AsyncIterator[Link]:
    link = nats.node_link(node.node_id)
    async with answering(node, link, **options), linked(link):
        await up(link)
        yield link


async def up(*links: Link) -> None:
    async with asyncio.timeout(20):
        for link in links:
            await link.until_up()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_server_that_dies_and_comes_back_is_found_again(nats: NatsServer) -> None:
    node = FakeNode()
    async with a_node(nats, node) as there, a_control(nats) as (link, inbox):
        remote = RemoteNode(link, inbox, node.node_id)
        await remote.do(EnsureRunning(a_wish(new_sandbox_id())))
        nats.kill()
        await until(lambda: not link.is_up)
        before = list(node.asked)
        with pytest.raises(UnavailableError):
            await remote.do(EnsureRunning(a_wish(new_sandbox_id())))
        nats.start()
        await up(link, there)
        assert len((await remote.do(Report())).machines) == 1
        assert node.asked == [*before, "report"]  # what could not be said is not said later


async def test_a_server_that_hangs_is_seen_to_in_seconds(nats: NatsServer) -> None:
    node = FakeNode()
    async with a_node(nats, node) as there, a_control(nats) as (link, inbox):
        remote = RemoteNode(link, inbox, node.node_id)
        nats.hang()
        async with asyncio.timeout(10):
            await until(lambda: not link.is_up and not there.is_up)
            with pytest.raises(UnavailableError):
                await remote.do(Report())
        nats.go_on()
        await up(link, there)
        await remote.do(Report())


@pytest.mark.parametrize("is_up", [True, False])
async def test_a_link_ends_although_its_client_suppresses_that(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch, is_up: bool
) -> None:
    closing, real = asyncio.Event(), Client.close

    async def close(client: Client) -> None:
        closing.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.5)
        await real(client)

    monkeypatch.setattr(Client, "close", close)
    async with asyncio.timeout(10):
        async with linked(nats.control_link("one")) as link:
            if is_up:
                await up(link)
                assert link._client is not None
                await real(link._client)  # the link notices, and closes it as well
            else:
                nats.kill()
            await closing.wait()
    assert not link.is_up


async def test_where_nobody_listens_that_is_told_at_once(nats: NatsServer) -> None:
    async with a_control(nats) as (link, inbox), asyncio.timeout(messages.SILENCE_S):
        with pytest.raises(UnavailableError, match="is not there"):
            await RemoteNode(link, inbox, "nobody").do(Report())


async def test_what_takes_long_is_waited_for_as_long_as_the_node_says_so(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{server.__name__}.WORKING_S", 0.05)
    monkeypatch.setattr(f"{client.__name__}.SILENCE_S", 3.0)
    node = FakeNode()
    node.gate.clear()
    async with a_node(nats, node), a_control(nats) as (link, inbox), asyncio.TaskGroup() as tasks:
        remote = RemoteNode(link, inbox, node.node_id)
        starting = tasks.create_task(remote.do(EnsureRunning(a_wish(new_sandbox_id()))))
        done, _ = await asyncio.wait([starting], timeout=4)
        assert not done
        node.gate.set()
        assert (await starting).phase is Phase.RUNNING
        node.gate.clear()
        monkeypatch.setattr(f"{server.__name__}.WORKING_S", 60.0)
        with pytest.raises(DeadlineExceededError):
            await remote.do(EnsureRunning(a_wish(new_sandbox_id())))
        node.gate.set()


async def test_a_node_that_may_not_be_changed_answers_what_only_looks(nats: NatsServer) -> None:
    def check() -> None:
        raise UnavailableError("the node has no lease")

    node = FakeNode()
    async with a_node(nats, node, check=check), a_control(nats) as (link, inbox):
        remote = RemoteNode(link, inbox, node.node_id)
        await remote.do(Report())
        for ask in (
            remote.do(EnsureRunning(a_wish(new_sandbox_id()))),
            remote.do(EnsureGone(new_sandbox_id(), incarnation=1)),
            remote.do(WithdrawWorkspace("workspace")),
        ):
            with pytest.raises(UnavailableError, match="no lease"):
                await ask
        assert node.asked == ["report"]


async def test_an_answer_too_long_to_be_said_is_an_error(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = FakeNode()

    async def long_report(_: Report) -> NodeReport:
        return NodeReport(node.node_id, (), missing=("x" * 9 * 2**20,))

    monkeypatch.setattr(node, "report", long_report)
    async with a_node(nats, node), a_control(nats) as (link, inbox):
        with pytest.raises(UnavailableError, match="cannot send this"):
            await RemoteNode(link, inbox, node.node_id).do(Report())


async def test_what_a_node_says_is_short_and_fit_to_be_written_down(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, long = FakeNode(), "a\0\ud800" + "x" * 2**20
    fact = MachineFact("sandbox-abcdefghijkl", 1, Phase.DEAD, reason_code="c", reason_message=long)

    async def report(_: Report) -> NodeReport:
        return NodeReport(node.node_id, (fact,))

    async def console(_: ReadConsole) -> bytes:
        return b"\0" * 10_000

    monkeypatch.setattr(node, "report", report)
    monkeypatch.setattr(node, "console", console)
    async with a_node(nats, node), a_control(nats) as (link, inbox):
        remote = RemoteNode(link, inbox, node.node_id)
        (heard,) = (await remote.do(Report())).machines
        node.refusal = InternalError(long)
        with pytest.raises(InternalError) as failed:
            await remote.do(EnsureRunning(a_wish(new_sandbox_id())))
        assert await remote.do(ReadConsole("sandbox-abcdefghijkl")) == b"\0" * 10_000
    for text in (heard.reason_message, failed.value.message):
        assert text.startswith("a?x")
        assert len(text) <= 2000


async def test_what_nobody_understands_is_told_and_ends_nothing(nats: NatsServer) -> None:
    node = FakeNode()
    async with a_node(nats, node), a_control(nats) as (link, inbox):
        for words in (
            {}, {"op": "nonsense"}, {"op": 7, "args": 7}, {"op": "report", "args": [1]},
            {"op": "ensure_gone", "args": {"sandbox_id": 7, "incarnation": 1}},
            {"op": "ensure_gone", "args": {"sandbox_id": "x"}},
            {"op": "__class__", "args": {}},
        ):  # fmt: skip
            with inbox.answers() as (place, came):
                await link.say(f"node.{node.node_id}.do", words, reply=place)
                async with asyncio.timeout(5):
                    said = await came.get()
                assert said.values["error"]["code"] == "unsupported"
        assert node.asked == []
        await RemoteNode(link, inbox, node.node_id).do(Report())


# --- whoever says or hears what they may not ----------------------------------------------------


async def test_a_hostile_node_hears_nothing_and_is_heard_nowhere(nats: NatsServer) -> None:
    heard: list[NatsMessage] = []
    nodes = {name: FakeNode(name) for name in ("good", "evil")}
    evil = nats.node_link("evil")
    for subject in ("node.good.do", "node.*.do", "inbox.>", "hint.>", "ctl.>", ">"):
        evil.listen(subject, heard.append)
    async with (
        a_node(nats, nodes["good"]),
        a_control(nats) as (link, inbox),
        linked(evil),
    ):
        said: list[NatsMessage] = []
        other = nats.control_link("two")
        other.listen(">", said.append)
        async with linked(other):
            await up(evil, other)
            remote = RemoteNode(link, inbox, "good")
            await remote.do(EnsureRunning(a_wish(new_sandbox_id())))
            await until(lambda: len(said) == 2)  # what was asked, and the answer
            said.clear()
            with inbox.answers() as (place, came):
                for subject in ("node.good.do", "ctl.good.beat", "hint.sandboxes", place):
                    await evil.say(subject, {"op": "report", "args": {}})
                await evil.say("ctl.evil.beat", {"n": 1})
                await until(lambda: len(said) > 0)
                assert came.empty()
            assert [one.subject for one in said] == ["ctl.evil.beat"]
            assert nodes["good"].asked == ["ensure_running", "started"]
            assert heard == []


async def test_whoever_has_no_token_of_the_installation_gets_nowhere(
    nats: NatsServer, tmp_path: Path
) -> None:
    strangers = NatsServer(tmp_path, nats.port)  # keys of its own
    for link in (strangers.control_link(), nats.control_link(lasts=timedelta(seconds=-5))):
        async with linked(link):
            await until(partial(_is_refused, link))
            assert not link.is_up


def _is_refused(link: Link) -> bool:
    return "uthorization" in link.trouble


@pytest.mark.parametrize("nonce", ["", '"nonce": "sign-this", '])
async def test_whoever_speaks_in_the_clear_is_told_nothing(nats: NatsServer, nonce: str) -> None:
    said = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = f'{{"server_id": "x", {nonce}"headers": true, "max_payload": 100000, "proto": 1}}'
        writer.write(f"INFO {info}\r\n".encode())
        while data := await reader.read(4096):
            said.extend(data)
            if b"PING" in data:
                writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        link = nats.control_link()
        link.servers = (f"tls://127.0.0.1:{port}",)
        link.tls = ssl.create_default_context()
        async with linked(link):
            await until(lambda: "not use TLS" in link.trouble)
            assert not link.is_up
    for secret in (b"eyJ", b'"sig"', b"SUB ", b"PUB "):
        assert secret not in said


async def test_a_token_that_runs_out_ends_the_connection_and_a_new_one_opens_another(
    nats: NatsServer,
) -> None:
    async with a_control(nats):
        pass  # the server has started, and a token lasts whole seconds
    link, fresh = nats.control_link(lasts=timedelta(seconds=6)), nats.control_link()
    async with linked(link):
        await up(link)
        async with asyncio.timeout(20):
            await until(lambda: not link.is_up)
        link.login = fresh.login
        await up(link)


def test_keys_are_written_as_nats_writes_them() -> None:
    key = Key.new(Role.USER)
    assert key.name[0] == "U"
    assert name_of(Role.USER, public_of(key.name, Role.USER)) == key.name
    assert Key.new(Role.ACCOUNT).name[0] == "A"
    assert Key.new(Role.OPERATOR).name[0] == "O"
    assert "seed" not in repr(key)
    for bad in ("", "U", key.name[:-1] + "=", key.name.lower(), Key.new(Role.ACCOUNT).name, "Ü"):
        with pytest.raises(Exception, match="cannot use this key"):
            public_of(bad, Role.USER)


def test_an_error_told_in_no_known_way_is_an_error_all_the_same() -> None:
    for told in (None, 7, {}, {"code": "nonsense", "facts": 7}):
        assert isinstance(messages.failed(told), InternalError)
    assert PREFIX == "sy.v1"


async def test_a_close_that_takes_too_long_leaves_no_subscription_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stuck:
        def __init__(self) -> None:
            self.work = asyncio.create_task(asyncio.Event().wait())
            self._subs = {1: SimpleNamespace(_wait_for_msgs_task=self.work)}

        async def close(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(link_module, "_CLOSE_S", 0.01)
    stuck: Any = Stuck()
    await link_module._close(stuck)
    await asyncio.wait([stuck.work], timeout=60)
    assert stuck.work.cancelled()
