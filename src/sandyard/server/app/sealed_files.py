"""Files under a passphrase: they can be written and read in one pass, and a cut or altered one is
refused.

    magic                   24 bytes
    salt                    16 bytes
    frames                  a length of 4 bytes, and AES-256-GCM of up to 1 MiB with its tag

The key is scrypt of the passphrase and the salt. A frame's nonce is its number, and the last one is
authenticated as the last: none can be left out, moved or added.
"""

import os
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from sandyard.server.core.errors import DamagedError, InvalidArgumentError

_MAGIC = b"sandyard sealed file 1\n\0"
_SALT = 16
_PIECE = 1024 * 1024
_TAG = 16
_PASSPHRASE_MIN = 8
_MORE, _LAST = b"more", b"last"


class SealedWriter:
    """Writes such a file; without `close` it stays incomplete, and is refused."""

    def __init__(self, file: BinaryIO, passphrase: str) -> None:
        salt = os.urandom(_SALT)
        self._file = file
        self._cipher = _cipher(passphrase, salt)
        self._waiting = bytearray()
        self._frames = 0
        file.write(_MAGIC + salt)

    def write(self, data: bytes | memoryview) -> int:
        """Write data; some of it waits in memory."""
        self._waiting += data
        while len(self._waiting) > _PIECE:
            self._put(bytes(self._waiting[:_PIECE]), _MORE)
            del self._waiting[:_PIECE]
        return len(data)

    def flush(self) -> None:
        """Do nothing: frames are written when they are full."""

    def close(self) -> None:
        """Write the last frame."""
        self._put(bytes(self._waiting), _LAST)

    def _put(self, data: bytes, which: bytes) -> None:
        sealed = self._cipher.encrypt(self._frames.to_bytes(12, "big"), data, which)
        self._file.write(len(sealed).to_bytes(4, "big") + sealed)
        self._frames += 1


class SealedReader:
    """Reads such a file.

    Raises:
        InvalidArgumentError: it is no such file, or the passphrase is another.
        DamagedError: it was cut or altered; also while it is read.
    """

    def __init__(self, file: BinaryIO, passphrase: str) -> None:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise InvalidArgumentError("cannot read the backup: it was not made by Sandyard")
        self._file = file
        self._cipher = _cipher(passphrase, file.read(_SALT))
        self._frames = 0
        self._is_over = False
        self._waiting = b""
        self._read_frame()

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, none at the end."""
        while not self._waiting and not self._is_over:
            self._read_frame()
        if size < 0:
            size = len(self._waiting)
        found, self._waiting = self._waiting[:size], self._waiting[size:]
        return found

    def read_to_end(self) -> None:
        """Verify what has not been read."""
        while not self._is_over:
            self._read_frame()
        if self._file.read(1):
            raise DamagedError("cannot read the backup: something was appended to the file")

    def _read_frame(self) -> None:
        size = int.from_bytes(self._file.read(4), "big")
        sealed = self._file.read(min(size, _PIECE + _TAG))
        if len(sealed) < _TAG or len(sealed) != size:
            raise DamagedError("cannot read the backup: the file is truncated")
        nonce = self._frames.to_bytes(12, "big")
        for which in (_MORE, _LAST):
            try:
                self._waiting = self._cipher.decrypt(nonce, sealed, which)
            except InvalidTag:
                continue
            self._frames += 1
            self._is_over = which == _LAST
            return
        if self._frames:
            raise DamagedError("cannot read the backup: the file was altered")
        raise InvalidArgumentError(
            "cannot read the backup: the passphrase is another one, or the file was altered"
        )


def check_passphrase(passphrase: str) -> str:
    """Return a passphrase for a new file.

    Raises:
        InvalidArgumentError: it is too short.
    """
    if len(passphrase) < _PASSPHRASE_MIN:
        raise InvalidArgumentError(
            f"cannot use the passphrase: it needs at least {_PASSPHRASE_MIN} characters"
        )
    return passphrase


def _cipher(passphrase: str, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt, 32, n=2**15, r=8, p=1).derive(passphrase.encode()))
