"""Carries out the builds that were requested, several at once, and removes what was deleted.

A build is leased. One whose server ended is begun again, and what it had is removed first.
"""

import logging
from typing import Final

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.ids import new_secret
from sandyard.server.service.builds.builds import WORK
from sandyard.server.service.builds.copies import Copies
from sandyard.server.service.builds.job import Job
from sandyard.server.service.builds.progress import LEASE
from sandyard.server.service.builds.tools import BuildTools
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

_LOOK_S: Final = 2.0


class Building:
    """Claims builds and carries them out; it is to be run."""

    def __init__(self, tools: BuildTools) -> None:
        self._tools = tools
        self._server_id = tools.platform.server_id
        self._store = tools.platform.store
        self._bus = tools.platform.bus
        self._copies = Copies(tools.platform)
        self._at_work = 0

    async def run(self) -> None:
        """Work forever."""
        async with Crew() as crew:
            crew.start(self._tools.removal.run(), "deleted templates are no longer removed")
            crew.start(self._copies.run(), "templates are no longer copied between nodes")
            with self._bus.subscribe(WORK) as hints:
                while True:
                    try:
                        while self._at_work < self._tools.limits.at_once:
                            if not await self._begin(crew):
                                break
                    except SandyardError as error:
                        log.warning("cannot look for builds: %s; retrying", error.message)
                    except Exception:  # one that cannot be read must not end the others
                        log.exception("cannot begin a build; retrying")
                    await hints.wait(_LOOK_S)

    async def _begin(self, crew: Crew) -> bool:
        lease = new_secret()
        async with self._store.write(Turn.SHARED) as tx:
            build = await tx.builds.claim(self._server_id, lease=lease, lasts=LEASE)
        if build is None:
            return False
        self._at_work += 1
        job = Job(self._tools, build, lease)
        work = crew.start(job.run(), "a build could not be carried out")
        if work is None:
            self._at_work -= 1
            return False
        work.add_done_callback(lambda _: self._ended())
        return True

    def _ended(self) -> None:
        self._at_work -= 1
        self._bus.hint(WORK)
