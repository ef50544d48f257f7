"""A control plane's view of the nodes: requests are sent over NATS, answers arrive in an inbox."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sandyard.server.core.codec import CodecError
from sandyard.server.core.contracts.node import (
    Connection,
    MachineAbout,
    MachineFact,
    MachineWish,
    NodeReport,
    SnapshotFact,
    TemplateFact,
    VersionFact,
)
from sandyard.server.core.egress import Credentials, Policy
from sandyard.server.core.errors import DeadlineExceededError, UnavailableError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.records import VersionAbout
from sandyard.server.core.shapes import Shape
from sandyard.server.links.nats.asks import ASKS, SILENCE_S, failed
from sandyard.server.links.nats.link import Link, NatsMessage

log = logging.getLogger(__name__)

_BACK_S: Final = 1.0
_AGAIN_S: Final = 0.1
INBOX: Final = "inbox"
"""What the places begin with where answers come."""


class Inbox:
    """Receives the answers to one control plane; create it before the link is opened."""

    def __init__(self, link: Link, name: str) -> None:
        self._place = f"{INBOX}.{name}"
        self._waiting: dict[str, asyncio.Queue[NatsMessage]] = {}
        link.listen(f"{self._place}.*", self._take)

    @contextmanager
    def answers(self) -> Iterator[tuple[str, "asyncio.Queue[NatsMessage]"]]:
        """Yield a reply subject, and a queue of the messages sent to it."""
        place, came = f"{self._place}.{new_secret()}", asyncio.Queue[NatsMessage]()
        self._waiting[place] = came
        try:
            yield place, came
        finally:
            del self._waiting[place]

    def _take(self, heard: NatsMessage) -> None:
        came = self._waiting.get(heard.subject)
        if came is not None:  # otherwise its caller has given up
            came.put_nowait(heard)


class RemoteNode:
    """See NodeControl, NodeExports and NodeVersions in core.contracts.node: the one that listens as
    `node_id`.

    Any method raises UnavailableError if NATS or the node does not answer; the request may have
    been executed.
    """

    def __init__(self, link: Link, inbox: Inbox, node_id: str) -> None:
        self._link = link
        self._inbox = inbox
        self._node_id = node_id

    @property
    def node_id(self) -> str:
        """See core.contracts.node.NodeControl.node_id."""
        return self._node_id

    async def ensure_running(self, wish: MachineWish) -> MachineFact:
        """See core.contracts.node.NodeControl.ensure_running."""
        fact: MachineFact = await self._ask("ensure_running", wish=wish)
        return fact

    async def ensure_paused(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> int:
        """See core.contracts.node.NodeControl.ensure_paused."""
        size: int = await self._ask(
            "ensure_paused", sandbox_id=sandbox_id, incarnation=incarnation, version=version
        )
        return size

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> None:
        """See core.contracts.node.NodeControl.ensure_gone."""
        await self._ask(
            "ensure_gone", sandbox_id=sandbox_id, incarnation=incarnation, version=version
        )

    async def ensure_snapshot(
        self, snapshot_id: str, *, sandbox_id: str, incarnation: int, version: int = 0
    ) -> SnapshotFact:
        """See core.contracts.node.NodeControl.ensure_snapshot."""
        fact: SnapshotFact = await self._ask(
            "ensure_snapshot",
            snapshot_id=snapshot_id,
            sandbox_id=sandbox_id,
            incarnation=incarnation,
            version=version,
        )
        return fact

    async def ensure_network(
        self,
        sandbox_id: str,
        *,
        incarnation: int,
        policy: Policy,
        credentials: Credentials | None = None,
        version: int = 0,
    ) -> None:
        """See core.contracts.node.NodeControl.ensure_network."""
        await self._ask(
            "ensure_network",
            sandbox_id=sandbox_id,
            incarnation=incarnation,
            policy=policy,
            credentials=credentials,
            version=version,
        )

    async def connections(
        self, sandbox_id: str, *, since: float | None = None
    ) -> tuple[Connection, ...]:
        """See core.contracts.node.NodeControl.connections."""
        found: tuple[Connection, ...] = await self._ask(
            "connections", sandbox_id=sandbox_id, since=since
        )
        return found

    async def find_machine(self, sandbox_id: str) -> MachineAbout:
        """See core.contracts.node.NodeControl.find_machine."""
        about: MachineAbout = await self._ask("find_machine", sandbox_id=sandbox_id)
        return about

    async def find_snapshot(self, snapshot_id: str) -> SnapshotFact:
        """See core.contracts.node.NodeControl.find_snapshot."""
        fact: SnapshotFact = await self._ask("find_snapshot", snapshot_id=snapshot_id)
        return fact

    async def drop_snapshot(self, snapshot_id: str) -> None:
        """See core.contracts.node.NodeControl.drop_snapshot."""
        await self._ask("drop_snapshot", snapshot_id=snapshot_id)

    async def find_room(self, template: str, shape: Shape, *, count: int = 1) -> bool:
        """See core.contracts.node.NodeControl.find_room."""
        waits: bool = await self._ask("find_room", template=template, shape=shape, count=count)
        return waits

    async def console(self, sandbox_id: str) -> bytes:
        """See core.contracts.node.NodeControl.console."""
        said: bytes = await self._ask("console", sandbox_id=sandbox_id)
        return said

    async def report(self) -> NodeReport:
        """See core.contracts.node.NodeControl.report."""
        report: NodeReport = await self._ask("report")
        return report

    async def templates(self) -> tuple[TemplateFact, ...]:
        """See core.contracts.node.NodeControl.templates."""
        facts: tuple[TemplateFact, ...] = await self._ask("templates")
        return facts

    async def withdraw(self, workspace_id: str) -> None:
        """See core.contracts.node.NodeExports.withdraw."""
        await self._ask("withdraw", workspace_id=workspace_id)

    async def keep_version(
        self, sandbox_id: str, *, incarnation: int, path: str, about: VersionAbout, size_max: int
    ) -> VersionFact:
        """See core.contracts.node.NodeVersions.keep_version."""
        fact: VersionFact = await self._ask(
            "keep_version",
            sandbox_id=sandbox_id,
            incarnation=incarnation,
            path=path,
            about=about,
            size_max=size_max,
        )
        return fact

    async def prepare_version(self, version: str) -> None:
        """See core.contracts.node.NodeVersions.prepare_version."""
        await self._ask("prepare_version", version=version)

    async def drop_version(self, version: str) -> None:
        """See core.contracts.node.NodeVersions.drop_version."""
        await self._ask("drop_version", version=version)

    async def drop_stages(self, build_id: str, *, but: tuple[str, ...]) -> None:
        """See core.contracts.node.NodeVersions.drop_stages."""
        await self._ask("drop_stages", build_id=build_id, but=but)

    async def _ask(self, name: str, **args: object) -> Any:
        ask = ASKS[name]
        words = {"op": name, "args": ask.written(args)}
        until = asyncio.get_running_loop().time() + _BACK_S
        while (heard := await self._heard(words)).is_undelivered:
            # It may be moving from one server to another, and has not received the request.
            if asyncio.get_running_loop().time() > until:
                raise UnavailableError(f"the node {self._node_id} is not there")
            await asyncio.sleep(_AGAIN_S)
        if "error" in heard.values:
            raise failed(heard.values["error"])
        try:
            return ask.answer(heard.values.get("value"))
        except CodecError as error:
            log.warning("the node %s sent an invalid answer: %s", self._node_id, error)
            raise UnavailableError(f"the node {self._node_id} sent an invalid answer") from error

    async def _heard(self, words: Mapping[str, object]) -> NatsMessage:
        """Send the request once, and return its outcome."""
        with self._inbox.answers() as (place, came):
            await self._link.say(f"node.{self._node_id}.do", words, reply=place)
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        heard = await came.get()
                except TimeoutError as error:
                    raise DeadlineExceededError(
                        f"the node {self._node_id} does not answer"
                    ) from error
                if not heard.values.get("working"):
                    return heard
