"""Collects a command's output from the frames that carry it: bytes in, its end out, no I/O."""

import json

from sandyard.server.core.codec import CodecError, decode
from sandyard.server.core.ops import Ended
from sandyard.server.core.wire import Channel, Decoder, WireError, printable

_DURATION_MAX_MS = 10**10
_SIGNAL_MAX = 32


class Collector:
    """Feed it what arrives until it returns the end. It keeps at most `limit` bytes of each
    stream."""

    def __init__(self, limit: int = 0) -> None:
        self._decoder = Decoder()
        self._limit = limit
        self._output = {Channel.STDOUT: bytearray(), Channel.STDERR: bytearray()}
        self.is_truncated = False
        self.frames = 0
        self.is_behind = False
        """Whether it has been fed more than it has looked at."""

    @property
    def stdout(self) -> bytes:
        """The standard output."""
        return bytes(self._output[Channel.STDOUT])

    @property
    def stderr(self) -> bytes:
        """The standard error."""
        return bytes(self._output[Channel.STDERR])

    @property
    def size(self) -> int:
        """The number of bytes kept."""
        return sum(map(len, self._output.values()))

    def keep_no_more(self) -> None:
        """Discard what still arrives."""
        self._limit = 0

    def feed(self, data: bytes, *, most: int | None = None) -> Ended | None:
        """Add received bytes, and return how the command ended once that has arrived.

        At most `most` frames are examined; the rest is at the next call. See `is_behind`.

        Raises:
            WireError: the other side violated the protocol.
        """
        self._decoder.feed(data)
        last = None if most is None else self.frames + most
        self.is_behind = False
        while (frame := self._decoder.take_frame()) is not None:
            self.frames += 1
            self.is_behind = self.frames == last
            if frame.channel is Channel.EXIT:
                return _end(frame.payload)
            if frame.channel in self._output:
                kept = self._output[frame.channel]
                room = max(0, self._limit - len(kept))
                kept += frame.payload[:room]
                self.is_truncated = self.is_truncated or len(frame.payload) > room
            if self.is_behind:
                break
        return None


def _end(payload: bytes) -> Ended:
    try:
        end = decode(Ended, json.loads(payload))
    except (CodecError, ValueError, RecursionError) as error:
        raise WireError("the end of a command is not told as agreed") from error
    return Ended(
        exit_code=max(0, min(255, end.exit_code)),
        duration_ms=max(0, min(_DURATION_MAX_MS, end.duration_ms)),
        timed_out=end.timed_out,
        signal=printable(end.signal[:_SIGNAL_MAX]) if end.signal else None,
    )
