"""Terminals in a sandbox, whose output is passed to a function."""

import threading
from collections.abc import Callable

from sandyard.client._sync.processes import Process
from sandyard.client.models import Exited, Printed


class Terminal:
    """A program on a terminal. `on_output` receives what it prints, in a thread of its own."""

    def __init__(self, process: Process, on_output: Callable[[bytes], object]) -> None:
        self.process = process
        self._exited: Exited | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(on_output,), daemon=True)
        self._thread.start()

    def write(self, data: bytes | str) -> None:
        """Type something."""
        self.process.write(data)

    def resize(self, columns: int, rows: int) -> None:
        """Change its size."""
        self.process.resize(columns, rows)

    def kill(self) -> None:
        """End the program and everything it has started."""
        self.process.kill()

    def wait(self, timeout_s: float | None = None) -> Exited:
        """Return how the program ended, once it has and all output was passed on.

        Raises:
            TimeoutError: it has not ended in time.
            SandyardError: its sandbox was paused or deleted, or `on_output` raised.
        """
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        if self._exited is None:
            raise TimeoutError(f"the program did not end within {timeout_s} seconds")
        return self._exited

    def _run(self, on_output: Callable[[bytes], object]) -> None:
        try:
            for event in self.process.events():
                match event:
                    case Printed(data=data):
                        on_output(data)
                    case Exited():
                        self._exited = event
                    case _:
                        pass
        except Exception as error:  # noqa: BLE001 - `wait` raises it
            self._error = error
