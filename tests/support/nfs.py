"""An NFSv4.1 client of a few operations, written by hand: it can say what no kernel would say.

The numbers are those of RFC 8881 (operations, errors) and RFC 5531 (calls).
"""

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

OK, PERM, NOENT, IO, ACCESS, ROFS, STALE = 0, 1, 2, 5, 13, 30, 70
BADHANDLE, WRONGSEC, BADSESSION, SEQ_MISORDERED = 10001, 10016, 10052, 10063
_PROGRAM, _VERSION, _COMPOUND = 100003, 4, 1


def _opaque(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data + b"\0" * (-len(data) % 4)


class Reader:
    """Reads XDR."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        """Return the next 32-bit number."""
        (found,) = struct.unpack_from(">I", self._data, self._at)
        self._at += 4
        return int(found)

    def fixed(self, length: int) -> bytes:
        """Return so many bytes."""
        found = self._data[self._at : self._at + length]
        self._at += length + (-length % 4)
        return found

    def opaque(self) -> bytes:
        """Return bytes that tell their length."""
        return self.fixed(self.number())


class RefusedError(Exception):
    """The server answered with an error, whose number is `status`."""

    def __init__(self, status: int, done: int) -> None:
        super().__init__(f"NFS error {status} at the operation {done}")
        self.status = status


def put_root() -> bytes:
    """Begin at the root of all that is exported."""
    return struct.pack(">I", 24)


def put_handle(handle: bytes) -> bytes:
    """Begin at a file handle."""
    return struct.pack(">I", 22) + _opaque(handle)


def look_up(name: bytes) -> bytes:
    """Go on to what has this name."""
    return struct.pack(">I", 15) + _opaque(name)


def get_handle() -> bytes:
    """Ask for the file handle of where one is."""
    return struct.pack(">I", 10)


def read(count: int) -> bytes:
    """Read from the beginning, by the stateid that stands for nobody's."""
    return struct.pack(">I", 25) + b"\0" * 16 + struct.pack(">QI", 0, count)


def write(data: bytes) -> bytes:
    """Write to the beginning, by the stateid that stands for nobody's, and sync it."""
    return struct.pack(">I", 38) + b"\0" * 16 + struct.pack(">QI", 0, 2) + _opaque(data)


def make_folder(name: bytes) -> bytes:
    """Make a folder."""
    return struct.pack(">II", 6, 2) + _opaque(name) + struct.pack(">I", 0) + _opaque(b"")


class NfsClient(AbstractContextManager["NfsClient"]):
    """A connection, and on it a session of a client that calls itself `owner`."""

    def __init__(
        self, connection: socket.socket, owner: bytes, *, uid: int = 0, verifier: bytes = b""
    ) -> None:
        self._socket = connection
        self._uid = uid
        self._xid = int.from_bytes(os.urandom(3))
        self.owner = owner
        self.verifier = verifier or os.urandom(8)
        self.client_id = b""
        self.session = b""
        self.sequence = 0

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, operations: Sequence[bytes]) -> Reader:
        """Send a compound, and return what follows its answer's head.

        Raises:
            RefusedError: it came to an error.
        """
        self._xid += 1
        credential = struct.pack(">I", 0) + _opaque(b"stranger")
        credential += struct.pack(">III", self._uid, self._uid, 0)
        body = struct.pack(">IIIIII", self._xid, 0, 2, _PROGRAM, _VERSION, _COMPOUND)
        body += struct.pack(">I", 1) + _opaque(credential) + struct.pack(">II", 0, 0)
        body += _opaque(b"") + struct.pack(">II", 1, len(operations)) + b"".join(operations)
        self._socket.sendall(struct.pack(">I", 0x80000000 | len(body)) + body)
        answer = Reader(self._receive())
        answer.fixed(8)  # xid, reply
        if answer.number() != 0:
            raise RefusedError(-1, 0)
        answer.number()
        answer.opaque()  # verifier
        if (accepted := answer.number()) != 0:
            raise RefusedError(-1 - accepted, 0)
        status = answer.number()
        answer.opaque()
        done = answer.number()
        if status != OK:
            raise RefusedError(status, done)
        return answer

    def _receive(self) -> bytes:
        found = b""
        while True:
            (mark,) = struct.unpack(">I", self._exactly(4))
            found += self._exactly(mark & 0x7FFFFFFF)
            if mark & 0x80000000:
                return found

    def _exactly(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            more = self._socket.recv(length - len(found))
            if not more:
                raise ConnectionResetError("the server closed the connection")
            found += more
        return found

    def introduce(self) -> Self:
        """Be a client with a session from now on: EXCHANGE_ID, CREATE_SESSION, RECLAIM_COMPLETE."""
        said = self.call(
            [
                struct.pack(">I", 42)
                + self.verifier
                + _opaque(self.owner)
                + struct.pack(">III", 0, 0, 0)
            ]
        )
        said.fixed(8)
        self.client_id = said.fixed(8)
        first = said.number()
        channel = struct.pack(">IIIIIII", 0, 1 << 20, 1 << 20, 1 << 16, 16, 8, 0)
        said = self.call(
            [
                struct.pack(">I", 43) + self.client_id + struct.pack(">II", first, 0)
                + channel + channel + struct.pack(">III", 0x40000000, 1, 0)
            ]
        )  # fmt: skip
        said.fixed(8)
        self.session = said.fixed(16)
        self.ask([struct.pack(">II", 58, 0)])
        return self

    def ask(self, operations: Sequence[bytes], *, again: bool = False) -> Reader:
        """Send operations in the session, the last request once more if it is sent `again`."""
        self.sequence += not again
        head = struct.pack(">I", 53) + self.session + struct.pack(">IIII", self.sequence, 0, 0, 1)
        said = self.call([head, *operations])
        said.fixed(8)
        said.fixed(16 + 5 * 4)
        return said

    def handle_of(self, *names: bytes) -> bytes:
        """Return the file handle of a path from the root."""
        said = self.ask([put_root(), *(look_up(one) for one in names), get_handle()])
        said.fixed(8 * (1 + len(names)) + 8)
        return said.opaque()

    def read_file(self, handle: bytes, count: int = 4096) -> bytes:
        """Return the beginning of a file."""
        said = self.ask([put_handle(handle), read(count)])
        said.fixed(8 + 8)
        said.number()
        return said.opaque()
