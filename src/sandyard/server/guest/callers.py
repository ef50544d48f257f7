"""Incoming connections that the host listens for in the machine and has not taken yet."""

import itertools
import socket

from sandyard.server.guest.system import AbsentError


class Callers:
    """The connections, by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, socket.socket] = {}

    def add(self, caller: socket.socket) -> int:
        """Keep a connection and return its number."""
        number = next(self._numbers)
        self._waiting[number] = caller
        return number

    def is_waiting(self, number: int) -> bool:
        """Tell whether a connection has not been taken yet."""
        return number in self._waiting

    def take(self, number: int) -> socket.socket:
        """Return a connection, which the caller must close.

        Raises:
            AbsentError: there is none with that number.
        """
        try:
            return self._waiting.pop(number)
        except KeyError:
            raise AbsentError("the connection is not there any more") from None

    def drop(self, number: int) -> None:
        """Close a connection that nobody has taken."""
        caller = self._waiting.pop(number, None)
        if caller is not None:
            caller.close()
