"""A minimal NFSv4.1 client that tests how a file server handles locks and opens.

Operations, their numbers and errors are those of RFC 8881; calls are those of RFC 5531.
"""

import os
import socket
import struct
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Self

from typing_extensions import override

_PROGRAM, _VERSION, _COMPOUND = 100003, 4, 1
_MESSAGE_MAX = 1024 * 1024
_READ, _WRITE = 1, 2
_WRITE_LOCK, _WAITING_WRITE_LOCK = 2, 4
_MODE_BIT = 33 - 32
_ALL = 2**64 - 1


class Status(IntEnum):
    """The status of an operation; only these are distinguished."""

    OK = 0
    ACCESS = 13
    DENIED = 10010


class ProtocolError(Exception):
    """The server's answer violates the protocol."""


class _Op(IntEnum):
    GET_HANDLE = 10
    LOCK = 12
    LOOKUP = 15
    OPEN = 18
    PUT_HANDLE = 22
    PUT_ROOT = 24
    SET_ATTRIBUTES = 34
    EXCHANGE_ID = 42
    CREATE_SESSION = 43
    SEQUENCE = 53
    RECLAIM_COMPLETE = 58


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        return int.from_bytes(self.fixed(4))

    def fixed(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        if len(found) < length:
            raise ProtocolError("an answer ends too early")
        self._at += length + (-length % 4)
        return found

    def opaque(self) -> bytes:
        return self.fixed(self.number())


class NfsClient(AbstractContextManager["NfsClient"]):
    """A session of a client that acts as one user. It blocks; use it in a thread."""

    def __init__(self, connection: socket.socket, *, uid: int) -> None:
        self._socket = connection
        self._uid = uid
        self._owner = f"self-test {uid} {os.urandom(4).hex()}".encode()
        self._call_id = self._sequence = 0
        self._client = self._session = b""

    @override
    def __enter__(self) -> Self:
        reply = self._call(
            _op(_Op.EXCHANGE_ID, os.urandom(8), _opaque(self._owner), _words(0, 0, 0))
        )
        self._expect(reply, _Op.EXCHANGE_ID)
        self._client = reply.fixed(8)
        first = reply.number()
        channel = _words(0, _MESSAGE_MAX, _MESSAGE_MAX, 65536, 16, 8, 0)
        security = _words(0x40000000, 1, 0)
        head = self._client + _words(first, 0)
        reply = self._call(_op(_Op.CREATE_SESSION, head, channel, channel, security))
        self._expect(reply, _Op.CREATE_SESSION)
        self._session = reply.fixed(16)
        self._ask(_op(_Op.RECLAIM_COMPLETE, _words(0)))
        return self

    @override
    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def look_up(self, name: str) -> bytes:
        """Return the handle of an export."""
        reply = self._ask(
            _op(_Op.PUT_ROOT), _op(_Op.LOOKUP, _opaque(name.encode())), _op(_Op.GET_HANDLE)
        )
        for one in (_Op.PUT_ROOT, _Op.LOOKUP, _Op.GET_HANDLE):
            self._expect(reply, one)
        return reply.opaque()

    def open(
        self, folder: bytes, name: str, *, writes: bool, mode: int | None = None
    ) -> tuple[Status, bytes, bytes]:
        """Open a file, creating it if `mode` is given; return status, stateid and handle."""
        how = _words(0)
        if mode is not None:
            how = _words(1, 0) + _mode(mode)
        access = _READ | _WRITE if writes else _READ
        owner = self._client + _opaque(b"opener")
        claim = _words(0) + _opaque(name.encode())
        reply = self._ask(
            _op(_Op.PUT_HANDLE, _opaque(folder)),
            _op(_Op.OPEN, _words(0, access, 0), owner, how, claim),
            _op(_Op.GET_HANDLE),
        )
        self._expect(reply, _Op.PUT_HANDLE)
        if (status := self._status(reply, _Op.OPEN)) is not Status.OK:
            return status, b"", b""
        stateid = reply.fixed(16)
        reply.fixed(4 + 8 + 8)  # how the folder changed
        reply.number()  # flags
        for _ in range(reply.number()):  # attributes that were set
            reply.number()
        self._skip_delegation(reply)
        self._expect(reply, _Op.GET_HANDLE)
        return status, stateid, reply.opaque()

    def _skip_delegation(self, reply: _Reader) -> None:
        kind = reply.number()
        if kind == 3 and reply.number() in (1, 2):  # none, with a reason that has a flag
            reply.number()
        elif kind not in (0, 3):
            raise ProtocolError("a delegation was not asked for")

    def change_mode(self, handle: bytes, stateid: bytes, mode: int) -> None:
        """Set a file's permissions."""
        reply = self._ask(
            _op(_Op.PUT_HANDLE, _opaque(handle)), _op(_Op.SET_ATTRIBUTES, stateid, _mode(mode))
        )
        self._expect(reply, _Op.PUT_HANDLE)
        self._expect(reply, _Op.SET_ATTRIBUTES)

    def lock(self, handle: bytes, stateid: bytes, *, waits: bool) -> tuple[Status, bytes]:
        """Lock a whole file for writing; return the status, and the owner of a conflicting lock."""
        owner = self._client + _opaque(b"locker")
        reply = self._ask(
            _op(_Op.PUT_HANDLE, _opaque(handle)),
            _op(
                _Op.LOCK,
                _words(_WAITING_WRITE_LOCK if waits else _WRITE_LOCK, 0),
                struct.pack(">QQ", 0, _ALL),
                _words(1, 0), stateid, _words(0), owner,
            ),
        )  # fmt: skip
        self._expect(reply, _Op.PUT_HANDLE)
        status = self._status(reply, _Op.LOCK)
        if status is not Status.DENIED:
            return status, b""
        reply.fixed(8 + 8 + 4 + 8)  # offset, length, kind, the holder's client
        return status, reply.opaque()

    # --- the protocol ---------------------------------------------------------------------

    def _ask(self, *operations: bytes) -> _Reader:
        """Send operations in the session and return their results."""
        self._sequence += 1
        head = _op(_Op.SEQUENCE, self._session, _words(self._sequence, 0, 0, 0))
        reply = self._call(head, *operations)
        self._expect(reply, _Op.SEQUENCE)
        reply.fixed(16 + 5 * 4)
        return reply

    def _call(self, *operations: bytes) -> _Reader:
        self._call_id += 1
        credential = _words(0) + _opaque(b"self-test") + _words(self._uid, self._uid, 0)
        body = _words(self._call_id, 0, 2, _PROGRAM, _VERSION, _COMPOUND, 1) + _opaque(credential)
        body += _words(0, 0) + _opaque(b"") + _words(1, len(operations)) + b"".join(operations)
        self._socket.sendall(_words(0x80000000 | len(body)) + body)
        reply = _Reader(self._receive())
        reply.fixed(4 + 4)  # the call, a reply
        if reply.number() != 0:
            raise ProtocolError("the server denies the call")
        reply.number()
        reply.opaque()  # verifier
        if reply.number() != 0:
            raise ProtocolError("the server does not accept the call")
        reply.number()  # the last operation's status
        reply.opaque()
        reply.number()
        return reply

    def _receive(self) -> bytes:
        found = bytearray()
        while True:
            mark = int.from_bytes(self._exactly(4))
            length = mark & 0x7FFFFFFF
            if len(found) + length > _MESSAGE_MAX:
                raise ProtocolError("an answer is too long")
            found += self._exactly(length)
            if mark & 0x80000000:
                return bytes(found)

    def _exactly(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            more = self._socket.recv(length - len(found))
            if not more:
                raise ProtocolError("the server closed the connection")
            found += more
        return bytes(found)

    def _expect(self, reply: _Reader, op: _Op) -> None:
        number, status = reply.number(), reply.number()
        if (number, status) != (op, 0):
            raise ProtocolError(f"{op.name} ended with {status}")

    def _status(self, reply: _Reader, op: _Op) -> Status:
        number, status = reply.number(), reply.number()
        if number != op or status not in list(Status):
            raise ProtocolError(f"{op.name} ended with {status}")
        return Status(status)


def _op(op: _Op, *arguments: bytes) -> bytes:
    return _words(op) + b"".join(arguments)


def _words(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def _opaque(data: bytes) -> bytes:
    return _words(len(data)) + data + b"\0" * (-len(data) % 4)


def _mode(mode: int) -> bytes:
    """Return permissions as an attribute list."""
    return _words(2, 0, 1 << _MODE_BIT) + _opaque(_words(mode))
