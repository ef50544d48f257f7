"""The agent of a real machine, spoken to as a node does."""

import asyncio
import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import pytest
from tests.support.house import eventually
from tests.support.server import RealServer, longer, wait_until

from sandyard.server.core import ops
from sandyard.server.core.errors import (
    AgentError,
    ConflictError,
    GuestNotFoundError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from sandyard.server.core.wire import AGENT_PORT
from sandyard.server.drivers.namespaces import in_namespace
from sandyard.server.links.local import SystemClock
from sandyard.server.node.agent import AgentLink, run_command
from sandyard.server.node.host.firewall import GUEST_IP

pytestmark = pytest.mark.machine
_LIMIT_S = 20.0


class LaterOp(StrEnum):
    """The operations of a later version."""

    FLY = "fly"


@dataclass(frozen=True)
class Fly(ops.Operation[ops.Done]):
    """What this agent does not know."""

    op: ClassVar[Any] = LaterOp.FLY
    answer = ops.Done


def _link(server: RealServer, box: str, token: str | None = None) -> AgentLink:
    record = server.record_of(box)
    netns = f"{server.prefix}-{record['slot']}"

    async def dial(limit_s: float) -> socket.socket:
        connection = await asyncio.to_thread(in_namespace, netns, socket.socket)
        connection.setblocking(False)
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.get_running_loop().sock_connect(connection, (GUEST_IP, AGENT_PORT))
        except BaseException:
            connection.close()
            raise
        return connection

    return AgentLink(dial, token or record["token"], SystemClock())


async def test_what_it_does_not_know_it_refuses_and_goes_on(server: RealServer, box: str) -> None:
    link = _link(server, box)
    with pytest.raises(UnsupportedError, match="fly"):
        await link.ask(Fly(), limit_s=_LIMIT_S)
    assert (await link.ask(ops.Hello(), limit_s=_LIMIT_S)).pid > 0
    link.close()


async def test_one_connection_carries_one_operation_after_the_other(
    server: RealServer, box: str
) -> None:
    link = _link(server, box)
    dialled, dial = [], link._dial

    async def counted(limit_s: float) -> socket.socket:
        dialled.append(limit_s)
        return await dial(limit_s)

    link._dial = counted
    for _ in range(3):
        assert (await link.ask(ops.Hello(), limit_s=longer(_LIMIT_S))).pid > 0
        code = await run_command(link, "exit 7", limit_s=longer(_LIMIT_S), clock=SystemClock())
        assert code == 7
        await link.ask(ops.List(), limit_s=longer(_LIMIT_S))
    assert len(dialled) == 1
    with pytest.raises(UnsupportedError):
        await link.ask(Fly(), limit_s=longer(_LIMIT_S))
    with pytest.raises(NotFoundError):
        await link.ask(ops.Resize(ops.Size(80, 25), pid=1), limit_s=longer(_LIMIT_S))
    assert len(dialled) == 2  # a refusal ends the connection


async def test_who_does_not_have_its_token_gets_nothing(server: RealServer, box: str) -> None:
    link = _link(server, box, token="0" * 64)
    every: tuple[ops.Operation[Any], ...] = (
        ops.Stats(), ops.Execute("id", timeout_ms=1000), ops.Dial(22),
    )  # fmt: skip
    for operation in every:
        with pytest.raises(AgentError, match="token"):
            async with link.open(operation, limit_s=_LIMIT_S):
                pass


async def test_a_port_of_loopback_is_reached_both_ways(server: RealServer, box: str) -> None:
    link = _link(server, box)
    echo = (
        "import socket; s = socket.create_server(('127.0.0.1', 4321)); c, _ = s.accept()\n"
        "while d := c.recv(65536): c.sendall(d[::-1])\n"
        "c.sendall(b'over')"
    )
    begin = f'setsid python3 -c "{echo}" >/dev/null 2>&1 </dev/null &'
    # Not asked over and over from here: each answer would take the processor from what is begun.
    listens = "until grep -q ':10E1 .* 0A ' /proc/net/tcp; do sleep 0.2; done"
    with pytest.raises(NotFoundError, match="nothing listens"):
        await link.ask(ops.Dial(4321), limit_s=longer(_LIMIT_S))
    assert server.execute(box, f"{begin} {listens}")["exitCode"] == 0
    said = b""
    async with link.open(ops.Dial(4321), limit_s=longer(_LIMIT_S)) as opened:
        await opened.stream.write(b"\x00\xffabc")
        while len(said) < 5:
            said += await opened.stream.read(100)
        await opened.stream.write_eof()
        while more := await opened.stream.read(100):
            said += more
    assert said == b"cba\xff\x00over"
    wait_until(lambda: not any("create_server" in one for one in server.running(box)))


@pytest.mark.parametrize("port", [AGENT_PORT, 0, 65536, -1])
async def test_a_port_that_is_not_the_sandboxs_is_refused(
    server: RealServer, box: str, port: int
) -> None:
    with pytest.raises(InvalidArgumentError, match=str(port)):
        await _link(server, box).ask(ops.Dial(port), limit_s=_LIMIT_S)


async def test_of_many_that_would_replace_a_process_one_does(server: RealServer, box: str) -> None:
    link = _link(server, box)
    limit_s = longer(_LIMIT_S)

    async def living() -> set[int]:
        every = (await link.ask(ops.List(), limit_s=limit_s)).items
        return {one.pid for one in every if one.end is None}

    before = await living()
    first = await link.ask(ops.Start("sleep 600", tag="one"), limit_s=limit_s)
    successor = ops.Start("sleep 600", tag="one", replaces=first.pid)
    heard = await asyncio.gather(
        *(link.ask(successor, limit_s=limit_s) for _ in range(4)), return_exceptions=True
    )
    (second,) = [one for one in heard if isinstance(one, ops.Program)]
    assert [type(one) for one in heard if one is not second] == [GuestNotFoundError] * 3
    assert (await link.ask(ops.List(tag="one"), limit_s=limit_s)).items == (second,)

    every = (await link.ask(ops.List(), limit_s=limit_s)).items
    assert [one.tag for one in every if one.pid == first.pid] == [None]
    await link.ask(ops.Signal(9, tag="one", everything=True), limit_s=limit_s)

    async def has_ended() -> bool:
        return (await link.ask(ops.List(second.pid), limit_s=limit_s)).items[0].end is not None

    await eventually(has_ended, limit_s=limit_s)
    # Even a process that has ended loses its tag.
    with pytest.raises(ConflictError):
        await link.ask(ops.Signal(9, tag="one", forgets_tag=True), limit_s=limit_s)
    with pytest.raises(GuestNotFoundError):
        await link.ask(ops.Start("true", tag="one", replaces=second.pid), limit_s=limit_s)

    await link.ask(ops.Signal(9, pid=first.pid, everything=True), limit_s=limit_s)

    async def none_is_left() -> bool:
        return await living() <= before

    await eventually(none_is_left, limit_s=limit_s)
    link.close()
