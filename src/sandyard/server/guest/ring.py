"""The recent output of a process: a bounded part of a stream whose bytes are numbered."""

from collections import deque
from dataclasses import dataclass

from sandyard.server.core.wire import Channel

_PIECES_MAX = 4096
_SMALL = 4096


@dataclass(frozen=True)
class _Piece:
    begin: int
    channel: Channel
    data: bytes

    @property
    def end(self) -> int:
        return self.begin + len(self.data)


class Ring:
    """Keeps the last `size` bytes of all channels, in their order.

    Bytes are numbered from 0 over all channels: `begin` is the number of the first that is kept,
    `end` that of the next.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pieces: deque[_Piece] = deque()
        self.begin = 0
        self.end = 0

    def add(self, channel: Channel, data: bytes) -> None:
        """Add output; the oldest is discarded if there is no room."""
        last = self._pieces[-1] if self._pieces else None
        if last and last.channel is channel and len(last.data) + len(data) <= _SMALL:
            self._pieces[-1] = _Piece(last.begin, channel, last.data + data)
        else:
            self._pieces.append(_Piece(self.end, channel, data))
        self.end += len(data)
        self.begin = max(self.begin, self.end - self._size)
        while self._pieces and (
            self._pieces[0].end <= self.begin or len(self._pieces) > _PIECES_MAX
        ):
            self.begin = max(self.begin, self._pieces.popleft().end)

    def has_room(self, size: int, number: int) -> bool:
        """Tell whether so many bytes fit without discarding any from `number` on."""
        fits = self.end + size - self._size <= number
        return fits and (len(self._pieces) < _PIECES_MAX or self._pieces[0].end <= number)

    def since(self, number: int) -> list[tuple[int, Channel, bytes]]:
        """Return what is kept from a byte on: for each piece its offset, channel and bytes."""
        number = max(number, self.begin)
        wanted = []
        # From the end: a follower mostly wants the last piece or two.
        for piece in reversed(self._pieces):
            if piece.end <= number:
                break
            skip = max(0, number - piece.begin)
            wanted.append((piece.begin + skip, piece.channel, piece.data[skip:]))
        wanted.reverse()
        return wanted

    def forget(self) -> None:
        """Discard everything."""
        self._pieces.clear()
        self.begin = self.end
