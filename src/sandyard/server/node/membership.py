"""A node's membership of an installation: sends heartbeats every second, and keeps track of its
lease."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.cluster import Beat, Grant, Hello, Identity, Presence, Welcome
from sandyard.server.core.contracts.node import VIEW_MAX, NodeControl, NodeView
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnauthenticatedError,
    UnavailableError,
)
from sandyard.server.core.node_ops import Report

log = logging.getLogger(__name__)

_BEAT_S: Final = 1.0
_AGAIN_S: Final = 0.5
_REFUSED_S: Final = 6.0
_RENEW_S: Final = 6 * 3600.0
_ELSEWHERE_S: Final = 60.0
_FINAL = (ConflictError, NotFoundError, UnauthenticatedError)
_T = TypeVar("_T")


def boot_time() -> float:
    """Return a monotonic time that includes the time during which the host is suspended, in
    seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Telling:
    """What a node reports in its heartbeats; empty until its source is set by `of`."""

    def __init__(self) -> None:
        self._node: NodeControl | None = None

    def of(self, node: NodeControl) -> None:
        """Report about this node from now on."""
        self._node = node

    async def view(self) -> NodeView | None:
        """Return the current report."""
        if self._node is None:
            return None
        try:
            return (await self._node.do(Report())).view().within(VIEW_MAX)
        except Exception:  # heartbeats are sent whatever the report is
            log.exception("cannot make this node's report; sending the heartbeat without it")
            return None


class NodeMembership:
    """See the module. `registries` are the ways to a control plane, the best first; `keep` is given
    every identity that the node gets, `know` where each control plane that answers is reached.
    `telling` is what it tells of itself each time."""

    def __init__(
        self,
        node_id: str,
        registries: Sequence[Presence],
        *,
        hello: Callable[[], Hello],
        keep: Callable[[Identity], None],
        know: Callable[[str], None],
        clock: Clock,
        telling: "Telling | None" = None,
        boot_time: Callable[[], float] = boot_time,
    ) -> None:
        self._node_id = node_id
        self._registries = registries
        self._hello = hello
        self._keep = keep
        self._know = know
        self._telling = telling or Telling()
        self._clock = clock
        self._boot_time = boot_time
        self._lease_ends = 0.0
        self._is_by_the_first = True
        self._is_settled = asyncio.Event()

    @property
    def has_lease(self) -> bool:
        """Whether the node accepts changes."""
        return self._boot_time() < self._lease_ends

    def check(self) -> None:
        """Refuse requests without a lease.

        Raises:
            UnavailableError: the node has none.
        """
        if not self.has_lease:
            raise UnavailableError("cannot do this now: the node has no lease")

    async def settled(self) -> None:
        """Return once no other process can hold this node's lease, or once that cannot be
        determined."""
        await self._is_settled.wait()

    async def run(self) -> None:
        """Register and send heartbeats until this process is no longer the node.

        Raises:
            ConflictError: another process is this node.
            NotFoundError: the node was removed.
        """
        while True:
            welcome = await self._introduced()
            await self._beat_on(welcome.epoch, welcome.identity.trust)

    async def _introduced(self) -> Welcome:
        began = self._boot_time()
        while True:
            sent = self._boot_time()
            try:
                welcome = await self._call(lambda one: one.hello(self._node_id, self._hello()))
            except (NotFoundError, UnauthenticatedError):
                raise
            except ConflictError:
                # If the host was rebooted, the process that had the lease is gone.
                if self._boot_time() - began > _REFUSED_S:
                    raise
                await self._clock.sleep(_AGAIN_S)
            except SandyardError as error:
                self._is_settled.set()
                log.warning(
                    "no control plane accepts the registration of this node: %s; retrying",
                    error.message,
                )
                await self._clock.sleep(_AGAIN_S)
            else:
                # From before it was sent: the database's lease may begin then.
                self._lease_ends = sent + welcome.lease_s
                self._is_settled.set()
                self._keep(welcome.identity)
                self._know(welcome.door)
                log.info("registered this node, in epoch %s", welcome.epoch)
                return welcome

    async def _beat_on(self, epoch: int, trust: str) -> None:
        """Send heartbeats until the credentials must be renewed: after a time, or because the
        certificate authority is being replaced."""
        began = self._boot_time()
        had_lease, is_other, by_another = True, False, began
        while self._boot_time() < began + _RENEW_S:
            sent = self._boot_time()
            if self._is_by_the_first:
                by_another = sent
            elif sent > by_another + _ELSEWHERE_S:
                return  # the control plane that accepts it will say where the first way is now
            say = partial(self._beat, Beat(epoch, await self._telling.view()))
            try:
                grant: Grant
                try:
                    grant = await self._call(say)
                except InvalidArgumentError:  # the view cannot be read there
                    grant = await self._call(partial(self._beat, Beat(epoch)))
                self._lease_ends = sent + grant.lease_s
                self._know(grant.door)
                is_other = grant.trust not in ("", trust)
            except _FINAL:
                raise
            except SandyardError as error:
                log.debug("no control plane answers a heartbeat: %s; retrying", error.message)
            if had_lease != self.has_lease:
                had_lease = self.has_lease
                if had_lease:
                    log.warning("the heartbeats of this node are answered again")
                else:
                    log.error(
                        "the lease of this node has expired: changes are refused, machines continue"
                    )
            await self._clock.sleep(max(0.0, sent + _BEAT_S - self._boot_time()))
            # After the pause: control planes that do not agree yet would have it ask without one.
            if is_other:
                return

    async def _beat(self, beat: Beat, registry: Presence) -> Grant:
        return await registry.beat(self._node_id, beat)

    async def _call(self, say: Callable[[Presence], Awaitable[_T]]) -> _T:
        trouble: UnavailableError | None = None
        for number, registry in enumerate(self._registries):
            try:
                answer = await say(registry)
            except UnavailableError as error:
                trouble = error
                continue
            if self._is_by_the_first != (number == 0):
                self._is_by_the_first = number == 0
                log.warning(
                    "control planes are reached by %s again" if number == 0 else
                    "control planes are reached by another way than %s", "NATS"
                )  # fmt: skip
            return answer
        raise trouble or UnavailableError("cannot reach any control plane")
