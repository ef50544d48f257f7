"""One machine of a node, by concern: its record and files, process, guest, and saving.

A resident is used by one job at a time; its owner sees to that.
"""

import logging
from contextlib import suppress
from dataclasses import replace

from sandyard.server.core.codec import encode
from sandyard.server.core.contracts.node import MachineFact, MachineWish, Phase, Way
from sandyard.server.core.egress import Credentials, Policy
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.ids import new_machine_id, new_secret
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import Driver, End
from sandyard.server.node.exports.shares import Share, new_share
from sandyard.server.node.host.admission import promise_of
from sandyard.server.node.host.ledger import Promise
from sandyard.server.node.images.image import Image
from sandyard.server.node.machines.body import Body
from sandyard.server.node.machines.current import CurrentRecord
from sandyard.server.node.machines.guest import WAKE_LIMIT_S, Guest, Was
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.process import MachineProcess
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.node.machines.saving import Saving
from sandyard.server.tasks import concurrently

log = logging.getLogger(__name__)

_MOUNT_S = 30.0
_TRUST_S = 15.0
_TRUST_AGAIN_S, _TRUST_TRIES = 10.0, 60
_GROWTH_S_A_GIB = 0.25
_NOWHERE = -1


class Resident:
    """A machine. `current`, `process`, `guest` and `saving` each own one concern of it."""

    def __init__(self, record: Record, means: Means) -> None:
        self._means = means
        self.current = CurrentRecord(record, means.records)
        self.guest = Guest(means)
        self.process = MachineProcess(self.current, self.guest, means)
        self.saving = Saving(self.current, self.process, self.guest, means)
        self._trusted: str | None = None

    @classmethod
    def new(cls, wish: MachineWish, image: Image, driver: Driver, means: Means) -> "Resident":
        """Return a new machine; nothing of it is on the host yet."""
        made = cls(
            Record(
                id=new_machine_id(),
                sandbox_id=wish.sandbox_id,
                incarnation=wish.incarnation,
                version=wish.version,
                phase=Phase.STARTING,
                slot=_NOWHERE,
                template=wish.template,
                image=image.digest,
                driver=driver.name,
                os=image.os,
                vcpus=wish.shape.vcpus,
                memory_mib=wish.shape.memory_mib,
                disk_mib=wish.shape.disk_mib,
                token=new_secret(),
            ),
            means,
        )
        made.use(wish)
        return made

    # --- what it is -----------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """Its record."""
        return self.current.value

    @property
    def phase(self) -> Phase:
        """Its phase."""
        return self.current.phase

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return self.current.value.shape

    @property
    def body(self) -> Body:
        """Its files."""
        return self.current.body

    @property
    def is_up(self) -> bool:
        """Whether it has a process."""
        return self.process.machine is not None

    @property
    def is_saved(self) -> bool:
        """Whether its saved state is published."""
        return self.body.is_saved

    @property
    def is_down(self) -> bool:
        """Whether it is paused or dead, and has no process."""
        return self.phase in (Phase.PAUSED, Phase.DEAD) and not self.is_up

    @property
    def promise(self) -> Promise:
        """The resources reserved for it; a machine that is down has no memory."""
        promise = promise_of(self.shape)
        return promise._replace(memory_mib=0) if self.is_down else promise

    @property
    def used_mib(self) -> int:
        """The disk space that its files use; reads the disk."""
        return self.body.used_mib

    def has_answered(self, *, since: float) -> bool:
        """Tell whether it is well, and its agent has answered since a time."""
        pulse = self.guest.pulse
        is_well = self.is_up and not pulse.is_silent and pulse.stall is None
        return is_well and pulse.answered_at >= since

    def fact(self, *, way: Way | None) -> MachineFact:
        """Return what its node reports of it."""
        record, phase, why = self.record, self.phase, None
        if phase is Phase.HELD:  # reported as running, with the reason for the hold
            phase, why = Phase.RUNNING, self.saving.held_for
        elif phase is Phase.STARTING:  # a failed start that could not be removed
            phase = Phase.DEAD
        runs = phase is Phase.RUNNING
        if runs:
            why = why or self.guest.pulse.stall
        return MachineFact(
            sandbox_id=record.sandbox_id,
            incarnation=record.incarnation,
            phase=phase,
            is_silent=runs and self.guest.pulse.is_silent,
            is_used=self.guest.is_used,
            ip=self.process.place.ip if self.process.place else None,
            driver=record.driver,
            os=record.os,
            way=way,
            template=record.template,
            shape=self.shape,
            rules=self.process.rules,
            reason_code=why.code if why else record.reason_code,
            reason_message=why.message if why else record.reason_message,
        )

    # --- up and down ----------------------------------------------------------------------

    async def make_body(self, source: SavedMachine | None, *, is_recorded: bool = True) -> None:
        """Make its files: a clone of a saved machine, or an empty disk.

        The record is written first; without `is_recorded` the one on disk is not changed.

        Raises:
            NoCapacityError: the host's disk is full.
            DamagedError: the saved machine was altered.
        """
        if is_recorded:
            await self.current.write()
        await self.body.make(source, self._means.disks, disk_mib=self.record.disk_mib)

    def assign(self, wish: MachineWish) -> None:
        """Assign this machine, which waited in the pool, to a sandbox."""
        self.current.assign(wish)
        self.process.assign()
        self.process.credentials = wish.credentials

    async def set_up(
        self, wish: MachineWish, *, was: Was, grows: bool = False, limit_s: float | None = None
    ) -> None:
        """Turn it into the requested sandbox: grow its disk if necessary, set up the guest and
        mount workspaces. See `Guest.set_up` and `Exports.grant`."""
        if limit_s is None:
            limit_s = self._means.patience(WAKE_LIMIT_S)
        definition = self._means.images.definition(wish.template)
        if definition is not None and definition.env:
            wish = replace(wish, env={**definition.env, **wish.env})
        if grows:
            await self.process.saving_machine().grow_disk(wish.shape.disk_mib)
            # The guest's kernel writes tables for the new space, which takes time.
            limit_s += self._means.patience(_GROWTH_S_A_GIB) * wish.shape.disk_mib / 1024
        if wish.policy != self.record.policy:  # it waited in the pool
            await self.enforce(wish.policy, wish.credentials)
        self._trusted = None if wish.credentials is None else wish.credentials.certificate
        place, changes = self.process.place, {"disk_mib": wish.shape.disk_mib}
        if not wish.mounts or place is None:
            token = await self.guest.set_up(wish, was=was, grows=grows, limit_s=limit_s)
            self.current.update(token=token, mounted=None, **changes)
            return
        share = new_share(wish.org_id, wish.mounts)
        # The file server starts meanwhile; until then the guest reaches none.
        async with concurrently(self._means.exports.grant(place, share)) as granting:
            token = await self.guest.set_up(wish, was=was, grows=grows, limit_s=limit_s)
            self.current.update(token=token, mounted=encode(share), **changes)
            await granting
            await self._mount(share)

    def use(self, wish: MachineWish) -> None:
        """Use the network rules of a request when its process starts."""
        self.current.use(wish.policy)
        self.process.credentials = wish.credentials

    async def restrict(self, policy: Policy, credentials: Credentials | None) -> None:
        """Enforce these network rules from now on, and have the guest trust the authority in them;
        see `enforce` and `trust`."""
        await self.enforce(policy, credentials)
        await self.trust_if_possible()

    async def enforce(self, policy: Policy, credentials: Credentials | None) -> None:
        """Enforce these network rules from now on; see `Network.restrict`. They are in the record
        first, so that after a crash they are enforced, too."""
        self.process.credentials = credentials
        self.current.use(policy)
        await self.current.write()
        await self.process.restrict()

    async def trust(self) -> None:
        """Have the guest trust the authority by which TLS is ended for it, if any.

        Raises:
            UnavailableError, InternalError, InvalidArgumentError: it does not.
        """
        credentials = self.process.credentials
        if credentials is None or not self.record.policy.ends_tls:
            return
        if credentials.certificate != self._trusted:
            await self.guest.trust(credentials, limit_s=self._means.patience(_TRUST_S))
            self._trusted = credentials.certificate

    async def trust_if_possible(self) -> None:
        """Like `trust`, but retries in the background: a guest that does not answer keeps no
        machine from running, and its rules hold all the same."""
        if not await self._is_trusting():
            again = self._trust_again()
            self._means.crew.start(
                again, "a guest may not trust its authority", once=f"trust {self.record.id}"
            )

    async def _trust_again(self) -> None:
        for _ in range(_TRUST_TRIES):
            await self._means.clock.sleep(_TRUST_AGAIN_S)
            if not self.is_up or await self._is_trusting():
                return

    async def _is_trusting(self) -> bool:
        try:
            await self.trust()
        except SandyardError as error:
            log.warning("a guest does not trust its network's authority: %s", error.message)
            return False
        return True

    async def _mount(self, share: Share) -> None:
        await self.guest.mount(share, limit_s=self._means.patience(_MOUNT_S))

    async def mount_anew(self) -> None:
        """Mount its workspaces again if they were restored from a backup meanwhile: what its guest
        knows of their files leads nowhere."""
        share = self.record.share
        if not self.record.mounts_anew or share is None:
            return
        for one in sorted(share.mounts, key=lambda one: one.path, reverse=True):
            await self.guest.unmount(one.path)
        await self._mount(share)
        self.current.update(mounts_anew=False)

    def has_mounted(self, workspace_id: str) -> bool:
        """Tell whether its guest has a workspace mounted."""
        share = self.record.share
        return share is not None and any(one.workspace_id == workspace_id for one in share.mounts)

    async def unmount_others(self, wish: MachineWish) -> None:
        """Unmount the workspaces that a request does not mount: a sandbox may have been adopted
        without them."""
        share, kept = self.record.share, {one.workspace_id for one in wish.mounts}
        for one in () if share is None else share.mounts:
            if one.workspace_id not in kept:
                await self.unmount(one.workspace_id)

    async def unmount(self, workspace_id: str) -> None:
        """Unmount a workspace in its guest, if that answers, and record that."""
        share = self.record.share
        if share is None:
            return
        left = tuple(one for one in share.mounts if one.workspace_id != workspace_id)
        for one in share.mounts:
            if one.workspace_id == workspace_id and self.is_up:
                with suppress(SandyardError):
                    await self.guest.unmount(one.path)
                    # Mounts below that path were unmounted with it.
                    below = tuple(two for two in left if two.path.startswith(f"{one.path}/"))
                    if below:
                        await self._mount(replace(share, mounts=below))
        self.current.update(mounted=encode(replace(share, mounts=left)))
        await self.current.write()

    async def end(self, *, removes: bool = False) -> None:
        """Release its process and slot; with `removes`, also remove its files. May be repeated.

        Raises:
            UnavailableError: something could not be released.
        """
        await self.process.end()
        if removes:
            await self.current.remove()

    async def end_unwoken(self, end: End) -> None:
        """Release what its process had, which has ended before the machine was woken.

        It is paused again if the state that it was resumed from can be reinstated; otherwise it is
        dead.

        Raises: see `end`.
        """
        await self.end()
        if await self.saving.reinstate():
            self.current.mark(Phase.PAUSED)
        else:
            self.current.mark(Phase.DEAD, end)

    async def drop(self) -> None:
        """End and remove it as far as possible; adoption removes what is left."""
        try:
            await self.end(removes=True)
        except (SandyardError, OSError):
            log.exception("cannot remove all of a machine yet")
