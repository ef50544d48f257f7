"""Who is using which sandbox now: what is in use is never idle, however long it takes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Uses:
    """Counts uses under way in this process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def use(self, sandbox_id: str) -> Iterator[None]:
        """Keep a sandbox in use until the block is left."""
        self._counts[sandbox_id] += 1
        try:
            yield
        finally:
            self._counts[sandbox_id] -= 1
            if not self._counts[sandbox_id]:
                del self._counts[sandbox_id]

    def is_used(self, sandbox_id: str) -> bool:
        """Tell whether a sandbox is in use."""
        return sandbox_id in self._counts
