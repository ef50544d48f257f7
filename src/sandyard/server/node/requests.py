"""The requests of control planes to a node: the case of each operation, and what is done for it.

A request about a sandbox goes to its owner. `machines.phases` says what is done in which phase,
`jobs` how, and `owner` in which order.
"""

import asyncio
import logging
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import assert_never

from sandyard.server.core.codec import CodecError, decode
from sandyard.server.core.contracts.node import (
    CONNECTIONS_MAX,
    Connection,
    MachineAbout,
    MachineFact,
    MachineWish,
    SnapshotFact,
)
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    NotFoundError,
    SandyardError,
)
from sandyard.server.core.node_ops import (
    AnyNodeOperation,
    DropSnapshot,
    EnsureGone,
    EnsureNetwork,
    EnsurePaused,
    EnsureRunning,
    EnsureSnapshot,
    FindMachine,
    FindRoom,
    FindSnapshot,
    ListTemplates,
    MachineRequest,
    Query,
    ReadConsole,
    ReadJournal,
    Report,
    VersionRequest,
    WithdrawWorkspace,
)
from sandyard.server.core.records import Mount
from sandyard.server.egress.journal import time_of
from sandyard.server.node.capacity import Capacity
from sandyard.server.node.host.egress import read_journal
from sandyard.server.node.jobs import Jobs
from sandyard.server.node.library import Library
from sandyard.server.node.machines.console import FailedConsoles, read_console
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.phases import Ask, Step
from sandyard.server.node.owner import nothing_here
from sandyard.server.node.owners import Owners
from sandyard.server.node.reports import Reports
from sandyard.server.node.snapshots import KeptSnapshots
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)


class Requests:
    """Carries out the operations of core.node_ops."""

    def __init__(
        self,
        means: Means,
        owners: Owners,
        jobs: Jobs,
        *,
        snapshots: KeptSnapshots,
        consoles: FailedConsoles,
        capacity: Capacity,
        library: Library,
        reports: Reports,
    ) -> None:
        self._means = means
        self._owners = owners
        self._jobs = jobs
        self._snapshots = snapshots
        self._consoles = consoles
        self._capacity = capacity
        self._library = library
        self._reports = reports

    async def do(self, operation: AnyNodeOperation) -> object:
        """Carry out an operation, and return its answer."""
        if isinstance(operation, MachineRequest):
            return await self._change(operation)
        if isinstance(operation, Query):
            return await self._look(operation)
        if isinstance(operation, VersionRequest):
            return await self._library.do(operation)
        match operation:
            case DropSnapshot():
                await self._snapshots.remove(operation.snapshot_id)
            case WithdrawWorkspace():
                await self._withdraw(operation.workspace_id)
            case _:
                assert_never(operation)
        return None

    async def _change(self, asked: MachineRequest) -> object:
        match asked:
            case EnsureRunning():
                return await self._ensure_running(asked.wish)
            case EnsurePaused():
                return await self._ensure_paused(asked)
            case EnsureGone():
                await self._ensure_gone(asked)
            case EnsureSnapshot():
                return await self._ensure_snapshot(asked)
            case EnsureNetwork():
                await self._ensure_network(asked)
            case _:
                assert_never(asked)
        return None

    async def _look(self, asked: Query) -> object:
        match asked:
            case FindMachine():
                return self._find_machine(asked.sandbox_id)
            case FindSnapshot():
                return await in_thread(self._snapshots.fact, asked.snapshot_id)
            case FindRoom():
                return await self._capacity.find_room(
                    asked.template, asked.shape, count=asked.count
                )
            case ReadJournal():
                return await self._read_journal(asked.sandbox_id, asked.since)
            case ReadConsole():
                return await self._read_console(asked.sandbox_id)
            case Report():
                return self._reports.current()
            case ListTemplates():
                return self._means.images.facts()
            case _:
                assert_never(asked)

    async def _ensure_running(self, wish: MachineWish) -> MachineFact:
        with self._owners.lent(wish.sandbox_id) as owner:
            return await owner.bring_up(wish, partial(self._jobs.bring_up, owner, wish))

    async def _ensure_paused(self, asked: EnsurePaused) -> int:
        with self._owners.lent(asked.sandbox_id) as owner:
            await owner.at_rest(asked.incarnation, asked.version)
            if owner.step(Ask.PAUSE, asked.incarnation) is Step.PAUSE:
                await owner.do(owner.resident.saving.pause())
            elif owner.resident.is_up:  # it is paused, and its process did not end then
                await owner.do(owner.resident.end())
            return await in_thread(lambda: owner.resident.body.size_bytes)

    async def _ensure_gone(self, asked: EnsureGone) -> None:
        with self._owners.lent(asked.sandbox_id) as owner:
            removal = partial(self._jobs.remove, owner)
            await owner.remove(asked.incarnation, asked.version, removal)
        if owner.is_empty:
            self._consoles.forget(asked.sandbox_id)

    async def _ensure_snapshot(self, asked: EnsureSnapshot) -> SnapshotFact:
        folder = self._snapshots.folder(asked.snapshot_id)
        with self._owners.lent(asked.sandbox_id) as owner:
            await owner.at_rest(asked.incarnation, asked.version)
            if not folder.is_dir():
                owner.step(Ask.SAVE, asked.incarnation)
                await owner.do(self._jobs.snapshot(owner, folder))
        return self._snapshots.fact(asked.snapshot_id)

    async def _ensure_network(self, asked: EnsureNetwork) -> None:
        with self._owners.lent(asked.sandbox_id) as owner:
            await owner.at_rest(asked.incarnation, asked.version)
            owner.step(Ask.OPEN, asked.incarnation)
            await owner.do(owner.resident.restrict(asked.policy, asked.credentials))
        self._means.on_change()

    def _find_machine(self, sandbox_id: str) -> MachineAbout:
        owner = self._owners.find(sandbox_id)
        record = owner.resident.record
        try:
            policy, share = record.policy, record.share
        except CodecError as error:
            raise DamagedError(f"cannot read the record of {sandbox_id}: {error}") from error
        mounts = () if share is None else share.mounts
        return MachineAbout(
            record.incarnation,
            owner.version,
            policy,
            tuple(Mount(one.workspace_id, one.path, one.read_only) for one in mounts),
        )

    async def _read_journal(self, sandbox_id: str, since: float | None) -> tuple[Connection, ...]:
        folder = self._means.records.folder(self._owners.find(sandbox_id).resident.record.id)
        now = self._means.clock.now().timestamp()
        lines = await in_thread(read_journal, folder, now=now, since=since)
        if since is None:
            lines = lines[-CONNECTIONS_MAX:]
        found = (decode(Connection, one) for one in lines if since is None or time_of(one) > since)
        return tuple(islice(found, CONNECTIONS_MAX))

    async def _read_console(self, sandbox_id: str) -> bytes:
        console = None
        with suppress(NotFoundError):
            body = self._owners.find(sandbox_id).resident.body
            console = await in_thread(read_console, body.folder)
        if not console:
            # Nothing yet; an earlier start that failed may have left something.
            console = await in_thread(self._consoles.find, sandbox_id) or console
        if console is None:
            raise nothing_here(sandbox_id)
        return console

    async def _withdraw(self, workspace_id: str) -> None:
        async with asyncio.TaskGroup() as tasks:
            for sandbox_id in self._owners.ids():
                tasks.create_task(self._unmount(sandbox_id, workspace_id))
        await self._means.exports.withdraw(workspace_id)

    async def _unmount(self, sandbox_id: str, workspace_id: str) -> None:
        with self._owners.lent(sandbox_id) as owner:
            while owner.is_busy:
                with suppress(ConflictError):  # it was cancelled
                    await owner.idle()
            if owner.phase is None or not owner.resident.has_mounted(workspace_id):
                return
            try:
                await owner.do(owner.resident.unmount(workspace_id))
            except (SandyardError, OSError) as error:
                # The file server no longer serves it, to this machine neither.
                log.warning("cannot unmount a workspace in a machine: %s", error)
