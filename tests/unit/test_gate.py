"""The gate of connections: who makes room for whom."""

import asyncio
from typing import cast

import pytest

from sandyard.server.core.sources import source_of
from sandyard.server.front.engine import Gate


class Transport:
    is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


class Connection:
    def __init__(self) -> None:
        self.transport = cast("asyncio.Transport", Transport())
        self.is_idle = True

    @property
    def is_out(self) -> bool:
        return cast("Transport", self.transport).is_aborted


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
    ],
)
def test_a_source_is_an_address_or_a_network_of_one_host(address: str, source: str) -> None:
    assert source_of(address) == source


def entered(gate: Gate, address: str, count: int = 1) -> list[Connection]:
    made = [Connection() for _ in range(count)]
    for one in made:
        assert gate.enter(one, address) is None
    return made


def test_five_sources_that_ask_for_nothing_keep_nobody_out() -> None:
    gate = Gate(most=4096, most_by_address=1024)
    for number in range(5):
        entered(gate, f"192.0.2.{number}", 1000)
    (honest,) = entered(gate, "198.51.100.1")
    assert not honest.is_out
    gate.asked(honest)
    for number in range(50):
        entered(gate, f"2001:db8:{number}::1", 100)
    assert not honest.is_out


def test_addresses_of_one_64_count_together() -> None:
    gate = Gate(most=100, most_by_address=10)
    crowd = [entered(gate, f"2001:db8::{number:x}")[0] for number in range(10)]
    for one in crowd:
        gate.asked(one)
    refused = gate.enter(Connection(), "2001:db8::ffff")
    assert refused is not None
    assert "2001:db8::/64" in refused
    assert gate.enter(Connection(), "2001:db8:0:1::1") is None


def test_room_is_made_by_the_silent_then_by_the_resting_and_by_no_others() -> None:
    gate = Gate(most=7, most_by_address=100)  # none of so few is reserved
    silent, resting, working = (entered(gate, "192.0.2.1", 2) for _ in range(3))
    (last,) = entered(gate, "192.0.2.1")
    for one in (*resting, *working, last):
        gate.asked(one)
    for one in resting:
        gate.answered(one, is_known=False)
    gate.answered(last, is_known=False)
    last.is_idle = False  # its answer is still being sent
    for expected in (*silent, *resting):
        assert not expected.is_out
        (new,) = entered(gate, "198.51.100.7")
        gate.asked(new)
        assert expected.is_out
    assert gate.enter(Connection(), "198.51.100.7") is not None
    assert not any(one.is_out for one in (*working, last))


def test_a_part_is_kept_for_sources_that_were_known_lately() -> None:
    now = [0.0]
    gate = Gate(most=16, most_by_address=100, now=lambda: now[0])
    (friend,) = entered(gate, "198.51.100.1")
    gate.asked(friend)
    gate.answered(friend, is_known=True)
    gate.leave(friend)
    for one in entered(gate, "192.0.2.1", 14):
        gate.asked(one)
    assert gate.enter(Connection(), "192.0.2.2") is not None
    entered(gate, "198.51.100.1")
    now[0] = 4000.0
    assert gate.enter(Connection(), "198.51.100.1") is None  # in place of its own silent one
    for one in entered(gate, "203.0.113.1"):
        gate.asked(one)
    assert gate.enter(Connection(), "198.51.100.1") is not None


def test_what_becomes_another_protocols_is_counted_and_evicts_no_one() -> None:
    gate = Gate(most=16, most_by_address=2)
    crowd = [entered(gate, f"192.0.2.{number}")[0] for number in range(14)]
    one = crowd[0]
    gate.asked(one)
    gate.leave(one)
    socket = Connection()
    gate.take_over(socket, "192.0.2.0")
    assert not any(other.is_out for other in crowd)
    assert len(gate._open) == 14
    gate.leave(socket)
    assert len(gate._open) == 13


def test_what_left_is_counted_nowhere() -> None:
    gate = Gate(most=100, most_by_address=100)
    crowd = entered(gate, "192.0.2.1", 50)
    for one in crowd[:25]:
        gate.asked(one)
        gate.answered(one, is_known=True)
    for one in crowd:
        gate.leave(one)
        gate.leave(one)
        gate.asked(one)
        gate.answered(one, is_known=True)
    counts = (gate._open, gate._open._counts, gate._silent, gate._silent_of, gate._resting)
    assert not any(counts)
