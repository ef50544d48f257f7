"""Removes revoked SSH keys from the files of sandboxes that accepted them.

The gateway refuses a key from the moment it is deleted. A sandbox also has its keys in
`authorized_keys`, for users who start an sshd there. A running sandbox has the key removed at the
next comparison, a paused one after its resume, and one that is rolled back to a snapshot again
after that.
"""

import asyncio
import logging
from collections import defaultdict
from weakref import WeakValueDictionary

from sandyard.server.core.collect import Collector
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import MachineRef, NodeTunnel
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import ConflictError, SandyardError, UnavailableError
from sandyard.server.core.ops import Execute
from sandyard.server.core.records import RevokedKey
from sandyard.server.core.wire import WireError
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

_AT_ONCE = 8  # for each organization: unresponsive guests must not delay other tenants
_LIMIT_S = 20.0
_AGAIN_S = 60.0
_READ = 64 * 1024
# Lines of other keys stay as they are, and so do owner and mode. A file that the user has replaced
# by something else is left alone.
_SCRIPT = """\
f=/root/.ssh/authorized_keys n=$f.$$
[ -f "$f" ] && [ ! -h "$f" ] || exit 0
trap 'rm -f "$n"' EXIT
cp -p "$f" "$n" || exit
grep -vF {keys} <"$f" >"$n"
[ $? -le 1 ] && mv -f "$n" "$f"
"""


class Revoking:
    """Removes revoked keys."""

    def __init__(self, *, store: Store, tunnel: NodeTunnel, clock: Clock) -> None:
        self._store = store
        self._tunnel = tunnel
        self._clock = clock
        self._not_before: dict[str, float] = {}
        self._rooms = WeakValueDictionary[str, asyncio.Semaphore]()

    async def look(self, crew: Crew) -> None:
        """Start to remove the keys that are due; failures are retried.

        Raises:
            UnavailableError: the store does not answer.
        """
        async with self._store.read() as tx:
            pending = await tx.revoked_keys.pending()
        by_sandbox = defaultdict[str, list[RevokedKey]](list)
        for key in pending:
            by_sandbox[key.sandbox_id].append(key)
        now = self._clock.monotonic()
        self._not_before = {
            one: at for one, at in self._not_before.items() if one in by_sandbox and at > now
        }
        for sandbox_id, keys in by_sandbox.items():
            if sandbox_id not in self._not_before:
                room = self._rooms.setdefault(keys[0].org_id, asyncio.Semaphore(_AT_ONCE))
                what = "a revoked SSH key stays in the files of a sandbox"
                crew.start(self._remove(keys, room), what, once=f"revoke {sandbox_id}")

    async def _remove(self, keys: list[RevokedKey], room: asyncio.Semaphore) -> None:
        sandbox_id = keys[0].sandbox_id
        try:
            async with room:
                code = await self._execute(keys)
            if code != 0:
                # Caused by the sandbox itself: a full disk, or no grep.
                log.warning(
                    "a revoked SSH key stays in a sandbox's files: removing it exited with %d",
                    code,
                    extra={"sandbox_id": sandbox_id},
                )
            async with self._store.write(Turn.SHARED) as tx:
                for key in keys:
                    await tx.revoked_keys.removed(key)
        except ConflictError:  # it was paused or deleted meanwhile
            return
        except SandyardError as error:
            log.warning(
                "cannot remove a revoked SSH key from a sandbox's files: %s; retrying",
                error.message,
                extra={"sandbox_id": sandbox_id},
            )
            self._not_before[sandbox_id] = self._clock.monotonic() + _AGAIN_S

    async def _execute(self, keys: list[RevokedKey]) -> int:
        """Run the script and return its exit code."""
        ref = MachineRef(keys[0].node_id or "", keys[0].sandbox_id, keys[0].incarnation)
        # Of `type base64`, the second has no character that a shell takes for its own.
        patterns = " ".join(f"-e {key.public_key.split(' ')[1]}" for key in keys)
        wish = Execute(_SCRIPT.format(keys=patterns), timeout_ms=int(_LIMIT_S * 1000))
        collector = Collector()
        try:
            async with self._clock.timeout(_LIMIT_S), self._tunnel.open(ref, wish) as opened:
                while data := await opened.stream.read(_READ):
                    if (end := collector.feed(data)) is not None:
                        return end.exit_code
        except TimeoutError as error:
            raise UnavailableError("the agent did not report how a command ended") from error
        except WireError as error:
            raise UnavailableError("the agent violated its protocol") from error
        raise UnavailableError("the agent closed the connection during a command")
