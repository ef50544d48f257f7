"""An NFSv4 client of a few operations, written by hand: it can say what no kernel would say.

The numbers are those of RFC 8881, RFC 7862 and RFC 8276 (operations, errors) and RFC 5531 (calls).
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
        self.done = done


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


_ANYBODYS = b"\0" * 16


def _attributes(*numbers: int, values: bytes) -> bytes:
    words = [0, 0, 0]
    for number in numbers:
        words[number // 32] |= 1 << number % 32
    return struct.pack(">IIII", 3, *words) + _opaque(values)


def changing(name: bytes) -> dict[str, bytes]:
    """Return every operation that changes a file, for the current one, which has this name in the
    folder saved before: of NFSv4.0 to 4.2, and extended attributes."""
    size = _attributes(4, values=struct.pack(">Q", 0))
    mode = _attributes(33, values=struct.pack(">I", 0o777))
    span = struct.pack(">QQ", 0, 1 << 20)
    claim = struct.pack(">I", 0) + _opaque(name)
    opener = struct.pack(">I", 38) + b"\0" * 8 + _opaque(b"opener")
    return {
        "ALLOCATE": struct.pack(">I", 59) + _ANYBODYS + span,
        "CLONE": struct.pack(">I", 71) + _ANYBODYS * 2 + struct.pack(">QQQ", 0, 0, 0),
        "COPY": struct.pack(">I", 60) + _ANYBODYS * 2
        + struct.pack(">QQQIII", 4, 0, 4, 1, 1, 0),
        "CREATE": struct.pack(">II", 6, 2) + _opaque(b"made") + _attributes(values=b""),
        "DEALLOCATE": struct.pack(">I", 62) + _ANYBODYS + span,
        "LAYOUTCOMMIT": struct.pack(">I", 49) + span + struct.pack(">I", 0) + _ANYBODYS
        + struct.pack(">IIII", 0, 0, 4, 0),
        "LAYOUTGET": struct.pack(">IIII", 50, 0, 4, 2) + struct.pack(">QQQ", 0, 1 << 20, 1)
        + _ANYBODYS + struct.pack(">I", 4096),
        "LINK": struct.pack(">I", 11) + _opaque(b"linked"),
        "OPEN for writing": struct.pack(">IIII", 18, 0, 2, 0) + opener[4:] + struct.pack(">I", 0)
        + claim,
        "OPEN and truncate": struct.pack(">IIII", 18, 0, 2, 0) + opener[4:]
        + struct.pack(">II", 1, 0) + size + claim,
        "OPENATTR": struct.pack(">II", 19, 1),
        "REMOVE": struct.pack(">I", 28) + _opaque(name),
        "REMOVEXATTR": struct.pack(">I", 75) + _opaque(b"note"),
        "RENAME": struct.pack(">I", 29) + _opaque(name) + _opaque(b"renamed"),
        "SETATTR mode": struct.pack(">I", 34) + _ANYBODYS + mode,
        "SETATTR size": struct.pack(">I", 34) + _ANYBODYS + size,
        "SETXATTR": struct.pack(">II", 73, 0) + _opaque(b"note") + _opaque(b"x"),
        "WRITE": write(b"x"),
        "WRITE_SAME": struct.pack(">I", 70) + _ANYBODYS + struct.pack(">IQQQI", 2, 0, 4096, 1, 0)
        + _opaque(b"") + struct.pack(">I", 0) + _opaque(b"x"),
    }  # fmt: skip


def save_handle() -> bytes:
    """Keep the current file handle as the saved one."""
    return struct.pack(">I", 32)


def bind_to_session(session: bytes) -> bytes:
    """Have this connection serve a session, in both directions if that can be."""
    return struct.pack(">I", 41) + session + struct.pack(">II", 3, 0)


def destroy_session(session: bytes) -> bytes:
    """End a session."""
    return struct.pack(">I", 44) + session


class NfsClient(AbstractContextManager["NfsClient"]):
    """A connection, and on it a session of a client that calls itself `owner`."""

    def __init__(
        self,
        connection: socket.socket,
        owner: bytes,
        *,
        uid: int = 0,
        verifier: bytes = b"",
        minor: int = 1,
    ) -> None:
        self._socket = connection
        self._uid = uid
        self._minor = minor
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
        body += (
            _opaque(b"") + struct.pack(">II", self._minor, len(operations)) + b"".join(operations)
        )
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
        try:
            said = self.call([head, *operations])
        except RefusedError as error:
            if not error.done:  # what is not understood is not counted
                self.sequence -= 1
            raise
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
