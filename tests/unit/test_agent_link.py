"""The link to an agent: which connections it makes, keeps, and closes."""

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from sandyard.server.core import ops
from sandyard.server.core.codec import encode
from sandyard.server.core.wire import Answer, Channel, Decoder, encode_answer, encode_frame
from sandyard.server.links.local import SystemClock
from sandyard.server.node.agent import AgentLink


class Dialled:
    """Connections to an agent that says in each answer what it is told to; those it had."""

    def __init__(self, *, again: bool) -> None:
        self.again = again
        self.ends: list[asyncio.StreamWriter] = []
        self.serving: list[asyncio.Task[None]] = []
        self.after = b""

    async def dial(self, _: float) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.ends.append(writer)
        self.serving.append(asyncio.create_task(self.serve(reader, writer)))
        return ours

    async def close(self) -> None:
        """Close its ends of all of them."""
        for writer in self.ends:
            writer.close()
            await writer.wait_closed()
        await asyncio.wait(self.serving)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        while data := await reader.read(65536):
            decoder.feed(data)
            if (request := decoder.take_request()) is None:
                continue
            answers = {"hello": ops.Greeting(1), "exec": ops.Started(1)}
            values = encode(answers.get(request.op, ops.Done()))
            writer.write(encode_answer(Answer(values, again=self.again and request.again)))
            if request.op == "exec":
                writer.write(encode_frame(Channel.EXIT, b"{}") + self.after)


_HELLO, _RUNS = ops.Hello(), ops.Execute("true", timeout_ms=1)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("asked", [(_HELLO, _HELLO), (_RUNS, _HELLO), (_HELLO, _RUNS)])
async def test_a_connection_is_used_again_where_both_sides_would(
    asked: tuple[ops.Operation[Any], ...], again: bool
) -> None:
    dialled = Dialled(again=again)
    link = AgentLink(dialled.dial, "token", SystemClock())
    for operation in asked:
        async with link.open(operation, limit_s=5.0) as opened:
            if operation is _RUNS:
                await opened.stream.read(3)
                assert await opened.stream.read(100)
        assert link.lacks_spare is not again
    assert len(dialled.ends) == (1 if again else len(asked))
    link.close()
    await dialled.close()


@pytest.mark.parametrize("how", ["unread", "more", "input", "written", "raw", "closed", "raised"])
async def test_a_connection_that_may_not_be_clean_is_not_used_again(how: str) -> None:
    dialled = Dialled(again=True)
    dialled.after = b"x" if how == "more" else b""
    link = AgentLink(dialled.dial, "token", SystemClock())
    wishes: dict[str, ops.Operation[Any]] = {
        "input": ops.Execute("cat", timeout_ms=1, stdin=True), "raw": ops.Dial(22),
    }  # fmt: skip
    with contextlib.suppress(ZeroDivisionError):
        async with link.open(wishes.get(how, _RUNS), limit_s=5.0) as opened:
            if how not in ("unread", "raw"):
                await opened.stream.read(100)
            if how == "written":
                await opened.stream.write(b"x")
            if how == "closed":
                link.close()
            if how == "raised":
                raise ZeroDivisionError
    assert how == "closed" or link.lacks_spare
    assert (await link.ask(_HELLO, limit_s=5.0)).pid == 1
    assert len(dialled.ends) == 2
    link.close()
    await dialled.close()


@pytest.mark.parametrize("closes_first", [False, True])
async def test_a_connection_made_ahead_is_closed_with_its_link(closes_first: bool) -> None:
    ours, theirs = socket.socketpair()
    arrived, may_arrive = asyncio.Event(), asyncio.Event()

    async def dial(_: float) -> socket.socket:
        arrived.set()
        await may_arrive.wait()
        ours.setblocking(False)
        return ours

    link = AgentLink(dial, "token", SystemClock())
    opening = asyncio.create_task(link.open_spare(5.0))
    await arrived.wait()
    if closes_first:
        link.close()
    may_arrive.set()
    await opening
    if not closes_first:
        link.close()
    with theirs:
        theirs.settimeout(5.0)
        assert await asyncio.to_thread(theirs.recv, 1) == b""
