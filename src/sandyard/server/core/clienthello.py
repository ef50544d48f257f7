"""The name that a TLS client asks for, read from its first message (RFC 8446, 4.1.2; RFC 6066, 3).

Nothing is decrypted. The message may come in any number of pieces and records.
"""

from typing import Final

HELLO_MAX: Final = 16 * 1024
"""Bytes of a first message, its records' headers included. Browsers send 2 KB at most."""
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0
_RECORD_MAX = 2**14


class NotHelloError(ValueError):
    """What a client sent is not a first message of TLS, or names its server in a forbidden way."""


class HelloReader:
    """Reads a first message from the bytes of a connection."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = 0
        self._message = bytearray()

    @property
    def received(self) -> bytes:
        """All bytes so far, to be passed on."""
        return bytes(self._data)

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; tell whether the message is complete.

        Raises:
            NotHelloError: it cannot become one.
        """
        self._data += data
        if len(self._data) > HELLO_MAX:
            raise NotHelloError("it is too long")
        # What comes after the message is the client's own affair.
        while not self._is_whole and self._take_record():
            pass
        return self._is_whole

    def name(self) -> str | None:
        """Return the server's name, as it was sent; None if there is none.

        Raises:
            NotHelloError: the message is malformed, or has more than one name.
        """
        if not self._is_whole:
            raise NotHelloError("it is not complete")
        return _name_in(bytes(self._message[4 : 4 + self._length]))

    @property
    def _length(self) -> int:
        return int.from_bytes(self._message[1:4], "big")

    @property
    def _is_whole(self) -> bool:
        return len(self._message) >= 4 and len(self._message) >= 4 + self._length

    def _take_record(self) -> bool:
        """Take the next record, if all of it is there."""
        head = self._data[self._at : self._at + 5]
        if (head and head[0] != _HANDSHAKE) or (len(head) > 1 and head[1] != 3):
            raise NotHelloError("it is not TLS")
        if len(head) < 5:
            return False
        size = int.from_bytes(head[3:5], "big")
        if not 0 < size <= _RECORD_MAX:
            raise NotHelloError("it is not TLS")
        end = self._at + 5 + size
        if len(self._data) < end:
            return False
        self._message += self._data[self._at + 5 : end]
        self._at = end
        if self._message[0] != _CLIENT_HELLO:
            raise NotHelloError("it is another message of TLS")
        if len(self._message) >= 4 and self._length > HELLO_MAX:
            raise NotHelloError("it is too long")
        return True


class _Reader:
    """Reads fields of a message."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_done(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) < count:
            raise NotHelloError("it is malformed")
        self._at += count
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """Return a field that is preceded by its length."""
        return self.take(self.number(size))


def _name_in(message: bytes) -> str | None:
    hello = _Reader(message)
    hello.take(2 + 32)  # the version, random bytes
    for size in (1, 2, 1):  # the session, ciphers, compressions
        hello.vector(size)
    if hello.is_done:
        return None
    extensions = _Reader(hello.vector(2))
    if not hello.is_done:
        raise NotHelloError("it is malformed")
    names = []
    while not extensions.is_done:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind == _SERVER_NAME:
            names.append(_host_name(content))
    if len(names) > 1:
        raise NotHelloError("it names its server twice")
    return names[0] if names else None


def _host_name(content: bytes) -> str:
    extension = _Reader(content)
    listed = _Reader(extension.vector(2))
    kind, name = listed.number(1), listed.vector(2)
    if kind != _HOST_NAME or not listed.is_done or not extension.is_done:
        raise NotHelloError("it names its server twice")
    try:
        return name.decode("ascii")
    except UnicodeDecodeError as error:
        raise NotHelloError("its server's name is not ASCII") from error
