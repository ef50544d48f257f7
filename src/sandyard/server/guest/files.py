"""File operations, done by a forked child in the user's root and account.

A child may block on a slow disk or a dead network mount without holding up the agent, and it has
the rights of the account it works for, no more.
"""

import contextlib
import json
import os
import secrets
import socket
import stat

from sandyard.server.core import wire

_CHUNK = 128 * 1024


def send_file(connection: socket.socket, path: str) -> None:
    """Answer with the file's size and mode, then its bytes in frames, then how it ended."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        _refuse(connection, f"cannot read {path}: {error.strerror}")
        return
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            _refuse(connection, f"cannot read {path}: it is not a regular file")
            return
        values: dict[str, object] = {"size": found.st_size, "mode": stat.S_IMODE(found.st_mode)}
        connection.sendall(wire.encode_answer(wire.Answer(values)))
        try:
            while data := file.read(_CHUNK):
                connection.sendall(wire.encode_frame(wire.Channel.STDOUT, data))
        except OSError as error:
            _finish(connection, {"error": f"cannot read {path}: {error.strerror}"})
        else:
            _finish(connection, {})


def receive_file(
    connection: socket.socket, decoder: wire.Decoder, path: str, mode: int | None
) -> None:
    """Take frames until an empty one, then put the file in place whole, or leave the old one.

    The new file keeps the mode of the one it replaces unless `mode` is given.
    """
    if mode is None:
        mode = 0o644
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(os.stat(path).st_mode)
    part = f"{path}.part-{secrets.token_hex(6)}"
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _refuse(connection, f"cannot write {path}: {error.strerror}")
        return
    with contextlib.ExitStack() as undo:
        undo.callback(os.unlink, part)
        size = 0
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                connection.sendall(wire.encode_answer(wire.Answer({})))
                while data := _next_data(connection, decoder):
                    file.write(data)
                    size += len(data)
                os.fchmod(descriptor, mode)
            os.rename(part, path)
        except OSError as error:
            _finish(connection, {"error": f"cannot write {path}: {error.strerror}"})
            return
        undo.pop_all()
        _finish(connection, {"size": size})


def _next_data(connection: socket.socket, decoder: wire.Decoder) -> bytes:
    while (frame := decoder.take_frame()) is None:
        data = connection.recv(_CHUNK)
        if not data:
            raise ConnectionResetError(104, "the connection ended before the file did")
        decoder.feed(data)
    return frame.payload


def _refuse(connection: socket.socket, message: str) -> None:
    connection.sendall(wire.encode_answer(wire.Answer({}, error="bad_request", message=message)))


def _finish(connection: socket.socket, values: dict[str, object]) -> None:
    connection.sendall(wire.encode_frame(wire.Channel.EXIT, json.dumps(values).encode()))
