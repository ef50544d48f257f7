"""Resets the connections of a machine that was suspended.

Their peers are gone: a writer would wait for a timeout, an idle reader forever. The kernel is asked
to abort them (SOCK_DESTROY, sock_diag(7)), so that every program gets a reset at once.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator

from sandyard.server.guest.patience import patient

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
_SOCK_DESTROY = 21
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _DUMP, _ACK = 0x1, 0x300, 0x4
_LISTEN = 10
_TIME_WAIT = 6
# Connections in TIME_WAIT carry no data any more, and there may be very many.
_OPEN = 0xFFF & ~(1 << _LISTEN | 1 << _TIME_WAIT)
_CANNOT_LIST = frozenset({errno.ENOENT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP})
_HEADER = struct.Struct("=IHHII")
_LIMIT_S = 5.0
_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address in an IPv6 socket
_LOOPBACK_SIX = bytes(15) + b"\x01"


def break_off(*, own_port: int, peer_port: int) -> int:
    """Abort every TCP connection to another host, and return how many there were.

    The connection between `own_port` here and `peer_port` there is kept: it carries the request.
    Connections within the machine are intact at both ends, and are kept. A kernel that cannot list
    its connections (INET_TCP_DIAG) keeps them all, and programs wait for a timeout.
    """
    count = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(patient(_LIMIT_S))
        for family in (socket.AF_INET, socket.AF_INET6):
            for which in list(_connections(diag, family)):
                here, there = struct.unpack("!HH", which[:4])
                if (here, there) != (own_port, peer_port) and _is_elsewhere(family, which):
                    count += _destroy(diag, family, which)
    return count


def _connections(diag: socket.socket, family: int) -> Iterator[bytes]:
    """Yield the identity (struct inet_diag_sockid) of each connection."""
    diag.send(_message(_SOCK_DIAG_BY_FAMILY, _REQUEST | _DUMP, _request(family, bytes(48))))
    while True:
        data = diag.recv(65536)
        while len(data) >= _HEADER.size:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", data, _HEADER.size)[0]
                if number in _CANNOT_LIST:
                    return
                raise OSError(number, f"cannot list connections: {os.strerror(number)}")
            yield data[_HEADER.size + 4 : _HEADER.size + 52]
            data = data[(length + 3) & ~3 :]


def _destroy(diag: socket.socket, family: int, which: bytes) -> int:
    diag.send(_message(_SOCK_DESTROY, _REQUEST | _ACK, _request(family, which)))
    answer = diag.recv(4096)
    # A connection that has ended meanwhile is no error.
    with contextlib.suppress(struct.error):
        return int(struct.unpack_from("=i", answer, _HEADER.size)[0] == 0)
    return 0


def _request(family: int, which: bytes) -> bytes:
    return struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, _OPEN) + which


def _message(kind: int, flags: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, 1, 0) + payload


def _is_elsewhere(family: int, which: bytes) -> bool:
    """Tell whether a connection has two different addresses, neither of them loopback."""
    size = 4 if family == socket.AF_INET else 16
    here, there = which[4 : 4 + size], which[20 : 20 + size]
    return here != there and not _is_loopback(here) and not _is_loopback(there)


def _is_loopback(address: bytes) -> bool:
    if address.startswith(_MAPPED):
        address = address[len(_MAPPED) :]
    return address[0] == 127 if len(address) == 4 else address == _LOOPBACK_SIX
