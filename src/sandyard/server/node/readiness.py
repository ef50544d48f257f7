"""Whether a node can start machines at all."""

import logging

from sandyard.server.core.errors import SandyardError
from sandyard.server.node.machines.means import Means

log = logging.getLogger(__name__)


class MachineCheck:
    """Checks periodically whether there is a template and a driver that can run it."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self.missing: tuple[str, ...] = ("the node is starting",)
        """What prevents machines from starting, a sentence each."""

    async def run(self) -> None:
        """Check forever."""
        while True:
            try:
                self.missing = await self._find_missing()
            except SandyardError as error:
                self.missing = (error.message,)
            except Exception as error:  # the next check may succeed
                log.exception("cannot find out whether machines can be started")
                self.missing = (f"cannot find out whether machines can be started: {error}",)
            await self._means.clock.sleep(self._means.limits.watch_period_s)

    async def _find_missing(self) -> tuple[str, ...]:
        for slug in self._means.images.definitions:
            image = self._means.images.current(slug)
            if image is not None:
                await self._means.drivers.choose(image)
                return ()
        return ("no template has been built; run `sandyard template build base-ubuntu`",)
