"""Who has connected to what the host listens to in the machine, and was not taken yet."""

import itertools
import socket

from sandyard.server.guest.system import AbsentError


class Callers:
    """See the module."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, socket.socket] = {}

    def add(self, caller: socket.socket) -> int:
        """Keep one and return its number."""
        number = next(self._numbers)
        self._waiting[number] = caller
        return number

    def is_waiting(self, number: int) -> bool:
        """Tell whether one is still to be taken."""
        return number in self._waiting

    def take(self, number: int) -> socket.socket:
        """Return one, which is then the taker's to close.

        Raises:
            AbsentError: there is none of that number.
        """
        try:
            return self._waiting.pop(number)
        except KeyError:
            raise AbsentError("the connection is not there any more") from None

    def drop(self, number: int) -> None:
        """Close one that nobody has taken."""
        caller = self._waiting.pop(number, None)
        if caller is not None:
            caller.close()
