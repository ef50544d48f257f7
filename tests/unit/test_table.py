"""What the agent keeps of its processes: the ring, those who follow, the input."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core import ops
from sandyard.server.core.wire import Channel
from sandyard.server.guest import table
from sandyard.server.guest.ring import Ring
from sandyard.server.guest.system import ConflictingError, NoProcessError, RefusedError
from sandyard.server.guest.table import RING, Entry, Follower, Table

OUT, ERR = Channel.STDOUT, Channel.STDERR


@given(
    st.lists(st.tuples(st.sampled_from([OUT, ERR]), st.binary(max_size=9000)), max_size=30),
    st.integers(1, 20_000),
    st.integers(0, 300_000),
)
def test_a_ring_tells_the_last_bytes_in_order_from_any_of_them(
    pieces: list[tuple[Channel, bytes]], size: int, number: int
) -> None:
    ring, whole = Ring(size), []
    for channel, data in pieces:
        ring.add(channel, data)
        whole += [(channel, byte) for byte in data]
    assert ring.end == len(whole)
    assert ring.begin == max(0, len(whole) - size)
    number = min(max(number, ring.begin), ring.end)
    told = [(channel, byte) for _, channel, data in ring.since(number) for byte in data]
    assert told == whole[number:]


def test_a_ring_of_very_many_tiny_pieces_keeps_few_of_them() -> None:
    ring = Ring(100_000)
    for number in range(30_000):
        ring.add(OUT if number % 2 else ERR, b"x")
    assert ring.end == 30_000
    assert ring.begin > 20_000
    assert sum(len(data) for *_, data in ring.since(ring.begin)) == ring.end - ring.begin
    ring.forget()
    assert (list(ring.since(ring.end)), ring.begin) == ([], 30_000)


class Pipes:
    """What stands for a process: its pipes, and an end when it is told to have one."""

    is_terminal = False

    def __init__(self) -> None:
        self.pid = 7
        stdin, self.stdin = os.pipe()
        self.stdout, out = os.pipe()
        self.stderr, err = os.pipe()
        self.theirs = {"stdin": stdin, "stdout": out, "stderr": err}
        for one in (self.stdin, self.stdout, self.stderr, out):
            os.set_blocking(one, False)
        self.code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.is_released = False

    async def wait(self) -> int:
        return await asyncio.shield(self.code)

    async def end(self) -> None:
        self.code.set_result(-9)

    def release(self) -> None:
        self.is_released = True

    def signal(self, number: int) -> bool:
        return not self.code.done()

    def signal_everything(self, number: int) -> bool:
        return not self.code.done()

    def exits(self, code: int = 0) -> None:
        for one in self.theirs.values():
            os.close(one)
        self.theirs = {}
        self.code.set_result(code)

    async def prints(self, data: bytes, limit_s: float = 5.0) -> int:
        """Print, as long as there is room, and return how much that was."""
        printed = 0
        try:
            async with asyncio.timeout(limit_s):
                while printed < len(data):
                    try:
                        printed += os.write(self.theirs["stdout"], data[printed:])
                    except BlockingIOError:
                        await asyncio.sleep(0.005)
        except TimeoutError:
            pass
        return printed


@asynccontextmanager
async def living(
    *,
    waits_s: float = 0.0,
    limit_s: float | None = None,
    tag: str | None = None,
    hang_up_s: float | None = None,
) -> AsyncIterator[tuple[Table, Entry, Pipes]]:
    pipes, kept = Pipes(), Table()
    told = ops.Program(7, "c", "/", "root", 0, 0, tag=tag)
    process: Any = pipes
    entry = Entry(process, told, waits_s=waits_s, hang_up_s=hang_up_s)
    async with asyncio.TaskGroup() as tasks:
        kept.open(tasks)
        kept.keep(entry, limit_s=limit_s, keeps_end=True)
        yield kept, entry, pipes
        if not pipes.code.done():
            pipes.exits()


async def until_ended(entry: Entry) -> None:
    async with asyncio.timeout(5):
        while entry.end is None:
            await asyncio.sleep(0.005)


async def heard(follower: Follower) -> bytes:
    return b"".join([data async for _, data in follower.pieces()])


async def test_all_who_follow_hear_all_of_it_and_its_end() -> None:
    async with living() as (kept, entry, pipes), asyncio.TaskGroup() as tasks:
        with entry.followed(0) as one, entry.followed(0) as two:
            hearing = [tasks.create_task(heard(each)) for each in (one, two)]
            data = os.urandom(3 * RING)
            assert await pipes.prints(data) == len(data)
            pipes.exits(3)
            assert [await each == data for each in hearing] == [True, True]
        assert entry.end is not None
        assert (entry.end.exit_code, pipes.is_released) == (3, True)
        # Who comes later is told what is kept.
        with entry.followed(len(data) - 5) as late:
            assert await heard(late) == data[-5:]
        assert kept.find(7, None) is entry


async def test_who_reads_slowly_holds_it_back_and_who_leaves_lets_it_go_on() -> None:
    async with living() as (_, entry, pipes), asyncio.TaskGroup() as tasks:
        with entry.followed(0) as fast, entry.followed(0) as slow:
            hearing = tasks.create_task(heard(fast))
            data = bytes(4 * RING)
            printed = await pipes.prints(data, limit_s=2)
            assert RING // 4 < printed < 2 * RING
            assert entry.ring.begin == 0  # nothing is lost for the slow one
            assert slow.offset == 0
        assert await pipes.prints(data[printed:]) == len(data) - printed
        pipes.exits()
        # The other one left as well: it is not held to what it missed.
        assert len(await hearing) <= len(data)


async def test_without_a_follower_the_oldest_goes_and_the_first_is_waited_for() -> None:
    async with living(waits_s=30.0) as (_, entry, pipes):
        data = os.urandom(3 * RING)
        printed = await pipes.prints(data, limit_s=0.5)
        assert printed < 2 * RING
        with entry.followed(0) as first:
            assert first.offset == 0  # it was held back until somebody came
        assert printed + await pipes.prints(data[printed:]) == len(data)
        pipes.exits()
        await until_ended(entry)
        with entry.followed(0) as late:
            assert late.offset == len(data) - RING
            assert await heard(late) == data[-RING:]
        with entry.followed(None) as now:
            assert await heard(now) == b""


async def test_no_kind_of_output_makes_a_follower_miss_or_hear_twice() -> None:
    """Tiny pieces of two streams in turn, a ring that was full before, a pipe larger than it."""
    async with living() as (_, entry, pipes):
        err = pipes.theirs["stderr"]
        with entry.followed(0) as follower:
            pieces, said = follower.pieces(), b""
            for number in range(6000):  # more pieces than a ring keeps
                os.write(pipes.theirs["stdout"] if number % 2 else err, b"%d," % (number % 10))
                if number % 500 == 0:
                    await asyncio.sleep(0)
            told = asyncio.ensure_future(anext(pieces))
            said += (await told)[1]
            pipes.exits()
            async for _, data in pieces:
                said += data
        assert len(said) == 12_000
        assert follower.offset == 12_000
    async with living() as (_, entry, pipes):
        whole = os.urandom(6 * RING)
        assert await pipes.prints(whole[: 2 * RING]) == 2 * RING
        async with asyncio.timeout(5):
            while entry.ring.end < 2 * RING:
                await asyncio.sleep(0.005)
        with entry.followed(0) as follower:
            begin, said = follower.offset, b""
            assert begin == RING
            async with asyncio.TaskGroup() as tasks:
                printing = tasks.create_task(pipes.prints(whole[2 * RING :]))
                async for _, data in follower.pieces():
                    said += data
                    await asyncio.sleep(0)
                    if printing.done() and not pipes.code.done():
                        pipes.exits()
            assert said == whole[begin:]
    async with living() as (_, entry, pipes):
        size = 2**20
        fcntl.fcntl(pipes.stdout, fcntl.F_SETPIPE_SZ, size)
        with entry.followed(0) as follower:
            data = os.urandom(size)
            assert os.write(pipes.theirs["stdout"], data) == size
            pipes.exits()
            assert await heard(follower) == data


async def test_what_is_forgotten_is_not_told_of_for_ever() -> None:
    async with living() as (_, entry, pipes):
        await pipes.prints(b"x" * 1000)
        pipes.exits()
        await until_ended(entry)
        with entry.followed(0) as follower:
            entry.ring.forget()
            with pytest.raises(ConnectionAbortedError):
                await heard(follower)


async def test_its_time_is_bounded() -> None:
    async with living(limit_s=0.05) as (_, entry, pipes):
        async with asyncio.timeout(5):
            while not pipes.code.done():
                await asyncio.sleep(0.005)
        for one in pipes.theirs.values():
            os.close(one)
        with entry.followed(0) as follower:
            await heard(follower)
        assert entry.end is not None
        assert (entry.end.exit_code, entry.end.timed_out) == (124, True)


async def test_input_is_written_as_far_as_there_is_room_and_told() -> None:
    async with living() as (_, entry, pipes):
        assert await entry.feed(b"abc", closes=False) == (3, False)
        assert os.read(pipes.theirs["stdin"], 10) == b"abc"
        written, is_closed = await entry.feed(bytes(2**20), closes=True, limit_s=0.1)
        assert 0 < written < 2**20
        assert not is_closed
        assert entry.program().takes_input  # what was not written yet is not cut off
        # A writer that waits is told of the end, and nobody else's pipe is touched by that.
        waiting = asyncio.ensure_future(entry.feed(bytes(2**20), closes=False))
        await asyncio.sleep(0.02)
        pipes.exits()
        with pytest.raises(ConflictingError, match="cannot write"):
            await waiting
        await until_ended(entry)
        with pytest.raises(ConflictingError, match="ended"):
            await entry.feed(b"x", closes=False)


async def test_streams_of_the_same_bytes_are_written_once() -> None:
    """A client that was disconnected begins again, before its first connection has ended."""
    data, read = bytes(range(256)) * 2048, bytearray()
    async with living() as (_, entry, pipes):

        async def pour(begin: int) -> None:
            for at in range(begin, len(data), 1000):
                piece = data[at : at + 1000]
                assert await entry.feed(piece, closes=False, at=at) == (len(piece), False)

        pouring = asyncio.gather(pour(0), pour(0))
        while len(read) < len(data):
            read += os.read(pipes.theirs["stdin"], 4096) if entry.fed > len(read) else b""
            await asyncio.sleep(0)
        await pouring
        assert (bytes(read), entry.fed) == (data, len(data))
        with pytest.raises(ConflictingError, match="at byte"):
            await entry.feed(b"x", closes=False, at=len(data) + 1)


async def test_closed_input_takes_no_more() -> None:
    async with living() as (_, entry, pipes):
        assert await entry.feed(b"", closes=True) == (0, True)
        assert os.read(pipes.theirs["stdin"], 10) == b""
        with pytest.raises(ConflictingError, match="closed"):
            await entry.feed(b"x", closes=False)
        with pytest.raises(ConflictingError, match="no terminal"):
            entry.resize(ops.Size(80, 24))
        with pytest.raises(RefusedError, match="99"):
            entry.signal(99, everything=False)


async def test_ends_are_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tag="mine") as (kept, entry, pipes):
        pipes.exits()
        with entry.followed(0) as follower:
            await heard(follower)
        await asyncio.sleep(0)
        assert kept.find(None, "mine") is entry
        assert kept.living() == 0
        monkeypatch.setattr(table, "_KEPT_S", 0.0)
        with pytest.raises(NoProcessError, match="mine"):
            kept.find(None, "mine")
        with pytest.raises(RefusedError, match="pid or its tag"):
            kept.find(None, None)


async def test_who_is_hung_up_on_has_nobody_to_read_from_or_write_to() -> None:
    async with living(hang_up_s=0.0) as (_, entry, pipes):
        with entry.followed(0), entry.followed(0):
            assert await pipes.prints(b"x") == 1
        async with asyncio.timeout(5):
            with pytest.raises(BrokenPipeError):
                while True:
                    await pipes.prints(b"x")
                    await asyncio.sleep(0.005)
        assert os.read(pipes.theirs["stdin"], 1) == b""
        pipes.exits(5)
        await until_ended(entry)
        assert entry.end is not None
        assert (entry.end.exit_code, pipes.is_released) == (5, True)


def is_left_alone(entry: Entry) -> bool:
    assert entry._hanging_up is not None
    return entry._hanging_up.cancelled()


async def test_who_comes_back_in_time_is_not_hung_up_on() -> None:
    async with living(hang_up_s=3600.0) as (_, entry, pipes):
        for _ in range(3):
            with entry.followed(0):
                assert await pipes.prints(b"x") == 1
            assert not is_left_alone(entry)
        with entry.followed(0):
            assert is_left_alone(entry)
        pipes.exits()
        await until_ended(entry)
        assert is_left_alone(entry)


async def test_who_nobody_ever_follows_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_FIRST_FOLLOWER_S", 0.0)
    async with living(hang_up_s=0.01) as (_, entry, pipes):
        async with asyncio.timeout(5):
            with pytest.raises(BrokenPipeError):
                while True:
                    await pipes.prints(b"x")
                    await asyncio.sleep(0.005)
        pipes.exits()
        await until_ended(entry)
