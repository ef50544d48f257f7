"""Works on one sandbox: has its node do what its status requires, and stores the outcome."""

import logging
from collections.abc import Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

from sandyard.server.core.contracts.node import (
    MachineFact,
    MachineWish,
    NodeControl,
    Origin,
    Phase,
)
from sandyard.server.core.egress import digest_of
from sandyard.server.core.errors import (
    AgentError,
    AgentSilentError,
    ConflictError,
    DamagedError,
    IncompatibleError,
    InternalError,
    MachineDeadError,
    NoCapacityError,
    NotFoundError,
    OtherVersionError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import hostname_of
from sandyard.server.core.node_ops import EnsureGone, EnsureNetwork, EnsurePaused, EnsureRunning
from sandyard.server.core.records import NEXT_START, Claim, Reason, Sandbox
from sandyard.server.core.states import Event, Status
from sandyard.server.service.nodes import believed_bytes
from sandyard.server.service.sandboxes.mounts import mount_wishes
from sandyard.server.service.sandboxes.platform import Platform

log = logging.getLogger(__name__)

_SILENCE_S = 5.0
LOST = Reason("machine_lost", "the machine is no longer on its node")


class Work:
    """Does the work. Everything is written under the lease of the claim, or not at all."""

    def __init__(
        self,
        platform: Platform,
        *,
        start_limit_s: float,
    ) -> None:
        self._store = platform.store
        self._nodes = platform.nodes
        self._networks = platform.networks
        self._placement = platform.placement
        self._lifecycle = platform.lifecycle
        self._clock = platform.clock
        self._start_limit_s = start_limit_s

    def on(self, claim: Claim) -> Coroutine[object, object, None]:
        """Return the work that a sandbox's status requires.

        It raises ConflictError if the sandbox has changed meanwhile, and UnavailableError if it
        must be retried.
        """
        match claim.sandbox.status:
            case Status.PENDING:
                return self._place(claim)
            case Status.CREATING:
                return self._bring_up(claim)
            case Status.RESUMING:
                return self._bring_back(claim)
            case Status.PAUSING:
                return self._pause(claim)
            case Status.DESTROYING:
                return self._take_down(claim)
            case status:
                raise AssertionError(f"a sandbox that is {status} requires no work")

    # --- up -------------------------------------------------------------------------------

    async def _place(self, claim: Claim) -> None:
        """Choose a node for a sandbox that has none."""
        sandbox = claim.sandbox
        try:
            placed = await self._placement.choose(sandbox.template, sandbox.shape)
        except UnavailableError as error:
            await self._give_up_in_time(claim, error)
            raise
        there = await self._lifecycle.apply(
            sandbox, Event.PLACED, lease=claim.lease, node_id=placed.node_id
        )
        if there is not None:
            await self._bring_up(Claim(there, claim.lease))

    async def _bring_up(self, claim: Claim, *, may_move: bool = True) -> None:
        sandbox, wish = claim.sandbox, None
        try:
            wish = await self._wish(sandbox)
            fact = await self._running(self._nodes.get(sandbox.node_id), wish)
        except MachineDeadError:
            await self._start_again(claim, may_move=may_move)
        except ConflictError as error:
            # A node ahead of a restored database refuses every attempt.
            await self._give_up_in_time(claim, error)
            raise
        except (UnavailableError, OtherVersionError, InternalError, AgentError) as error:
            may_pass = isinstance(error, UnavailableError | OtherVersionError)
            if may_pass:
                await self._give_up_in_time(claim, error)
            if wish is not None and _is_of_the_node(wish, error):
                self._placement.note_failure(sandbox.node_id, error.message)
            # Move once, then wait: two full nodes would pass it back and forth.
            moved = await self._moved(claim, error) if may_move else None
            if moved is not None:
                await self._bring_up(moved, may_move=False)
            elif may_pass:  # a node that is too old for it may be updated
                raise UnavailableError(error.message) from error
            else:
                await self._give_up(claim, Reason("start_failed", error.message))
        except SandyardError as error:
            await self._give_up(claim, Reason("start_failed", error.message))
        else:
            await self._is_up(claim, fact, used="created")

    async def _start_again(self, claim: Claim, *, may_move: bool) -> None:
        """Start another machine for one that started and ended before it could be used."""
        sandbox = claim.sandbox
        changes: dict[str, Any] = {"incarnation": sandbox.incarnation + 1}
        if sandbox.from_snapshot_incarnation == sandbox.incarnation:
            changes["from_snapshot_incarnation"] = sandbox.incarnation + 1
        again = await self._lifecycle.apply(sandbox, Event.AGAIN, lease=claim.lease, **changes)
        if again is not None:
            await self._bring_up(Claim(again, claim.lease), may_move=may_move)

    async def _moved(self, claim: Claim, error: SandyardError) -> Claim | None:
        """Move a sandbox that its node cannot start to another node with capacity; return None if
        it stays.

        Whatever the first node still starts belongs to an old incarnation.
        """
        sandbox = claim.sandbox
        if wish_of(sandbox).origin is not Origin.NEW or sandbox.node_id is None:
            return None
        try:
            placed = await self._placement.choose(
                sandbox.template, sandbox.shape, but=sandbox.node_id
            )
        except UnavailableError:
            return None
        log.warning(
            "node cannot start a sandbox: %s; moving it to another node",
            error.message,
            extra={"sandbox_id": sandbox.id},
        )
        pending = await self._lifecycle.apply(
            sandbox,
            Event.DISPLACED,
            lease=claim.lease,
            node_id=None,
            incarnation=sandbox.incarnation + 1,
        )
        if pending is None:
            return None
        there = await self._lifecycle.apply(
            pending, Event.PLACED, lease=claim.lease, node_id=placed.node_id
        )
        return None if there is None else Claim(there, claim.lease)

    async def _is_up(self, claim: Claim, fact: MachineFact, *, used: str) -> None:
        reason = Reason(fact.reason_code, fact.reason_message) if fact.reason_code else None
        await self._lifecycle.apply(
            claim.sandbox,
            Event.READY,
            lease=claim.lease,
            reason=reason,
            used=used,
            ip=fact.ip,
            driver=fact.driver,
            os=fact.os,
            started_at=self._clock.now(),
            paused_at=None,
        )

    async def _give_up_in_time(self, claim: Claim, error: SandyardError) -> None:
        """Give up a start that failed for too long; return if it is to be retried."""
        waited = self._clock.now() - claim.sandbox.created_at
        if waited >= timedelta(seconds=self._start_limit_s):
            await self._give_up(claim, Reason(error.code.value, error.message))
            raise ConflictError("the start was given up after too many attempts") from error

    async def _give_up(self, claim: Claim, reason: Reason) -> None:
        log.error(
            "cannot start a sandbox: %s; marking it as error",
            reason.message,
            extra={"sandbox_id": claim.sandbox.id},
        )
        await self._lifecycle.apply(claim.sandbox, Event.BROKE, lease=claim.lease, reason=reason)

    async def _bring_back(self, claim: Claim) -> None:
        """Resume, or roll back. On failure the sandbox keeps its previous state."""
        sandbox = claim.sandbox
        wish = await self._wish(sandbox)
        try:
            fact = await self._brought_back(wish, sandbox)
        except MachineDeadError:
            # It was running already, and ended before that was stored.
            await self._give_up(claim, LOST)
        except ConflictError:
            raise
        except IncompatibleError as error:
            await self._stays_paused(claim, error)
        except (DamagedError, NotFoundError) as error:
            if wish.origin is Origin.SNAPSHOT:
                await self._stays_paused(claim, error)
                return
            code = "saved_state_unusable" if isinstance(error, DamagedError) else LOST.code
            await self._give_up(claim, Reason(code, error.message))
        except SandyardError as error:
            await self._stays_paused(claim, error)
        else:
            await self._is_up(claim, fact, used="resumed")

    async def _running(self, node: NodeControl, wish: MachineWish) -> MachineFact:
        """Return once a machine runs as requested; see core.node_ops.EnsureRunning.

        Raises:
            UnavailableError: also if the node cannot enforce its network rules.
        """
        if not wish.policy.is_default:
            report = await self._nodes.report_of(node)
            if not report.enforces_rules or (wish.policy.ends_tls and not report.ends_tls):
                raise UnavailableError(
                    f"the node {node.node_id} is of a version without these network rules: "
                    "update it"
                )
        fact = await node.do(EnsureRunning(wish))
        if fact.rules != digest_of(wish.policy, wish.policy.stamp):
            # It was started by an earlier request, with other rules.
            await node.do(
                EnsureNetwork(
                    wish.sandbox_id,
                    incarnation=wish.incarnation,
                    policy=wish.policy,
                    credentials=wish.credentials,
                    version=wish.version,
                )
            )
        return fact

    async def _brought_back(self, wish: MachineWish, sandbox: Sandbox) -> MachineFact:
        """Request a machine that ran on the node before; retry once if its agent is silent."""
        node = self._nodes.get(sandbox.node_id)
        try:
            return await self._running(node, wish)
        except AgentSilentError:
            await self._clock.sleep(_SILENCE_S)  # the cause may be temporary
            fact = await self._fact_of(sandbox)
            if fact is not None and fact.phase is Phase.DEAD:
                raise  # a repeated request would boot it from its disk
        return await self._running(node, wish)

    async def _fact_of(self, sandbox: Sandbox) -> MachineFact | None:
        report = await self._nodes.report_of(self._nodes.get(sandbox.node_id))
        return next((one for one in report.machines if one.sandbox_id == sandbox.id), None)

    async def _stays_paused(self, claim: Claim, error: SandyardError) -> None:
        sandbox = claim.sandbox
        fact = await self._fact_of(sandbox)
        asked_for = (sandbox.incarnation, Phase.RUNNING)
        if fact is not None and (fact.incarnation, fact.phase) == asked_for:
            # It was resumed, and only the answer was lost.
            await self._is_up(claim, fact, used="resumed")
            return
        log.error("cannot resume a sandbox: %s", error.message, extra={"sandbox_id": sandbox.id})
        has_code = isinstance(error, UnavailableError | IncompatibleError)
        code = error.code.value if has_code else "resume_failed"
        # After an error or a reboot, the memory cannot be resumed. A sandbox that was to be
        # rebooted keeps its state only if nothing was done to it yet.
        if wish_of(sandbox).origin is Origin.DISK:
            is_saved = fact is not None and fact.phase is Phase.PAUSED
        else:
            is_saved = fact is None or fact.phase is not Phase.DEAD
        await self._lifecycle.apply(
            sandbox,
            Event.RESUME_FAILED if is_saved else Event.BROKE,
            lease=claim.lease,
            reason=Reason(code, error.message),
        )

    # --- down -----------------------------------------------------------------------------

    async def _pause(self, claim: Claim) -> None:
        sandbox = claim.sandbox
        try:
            size = await self._nodes.get(sandbox.node_id).do(
                EnsurePaused(sandbox.id, incarnation=sandbox.incarnation, version=sandbox.version)
            )
        except (NotFoundError, MachineDeadError):
            await self._lifecycle.apply(
                sandbox, Event.BROKE, lease=claim.lease, reason=LOST, ip=None
            )
        except ConflictError:
            raise
        except SandyardError as error:
            log.error(
                "cannot pause a sandbox, which keeps running: %s",
                error.message,
                extra={"sandbox_id": sandbox.id},
            )
            code = error.code.value if isinstance(error, UnavailableError) else "pause_failed"
            await self._lifecycle.apply(
                sandbox,
                Event.PAUSE_FAILED,
                lease=claim.lease,
                reason=Reason(code, error.message),
                used="pause_failed",
            )
        else:
            await self._lifecycle.apply(
                sandbox,
                Event.SAVED,
                lease=claim.lease,
                reason=sandbox.reason,
                ip=None,
                paused_at=self._clock.now(),
                saved_bytes=believed_bytes(size, sandbox.shape),
            )

    async def _wish(self, sandbox: Sandbox) -> MachineWish:
        mounts = await mount_wishes(self._store, sandbox)
        credentials = await self._networks.credentials_of(sandbox.org_id, sandbox.network)
        return replace(wish_of(sandbox), mounts=mounts, credentials=credentials)

    async def _take_down(self, claim: Claim) -> None:
        sandbox = claim.sandbox
        if sandbox.node_id is not None and self._nodes.has(sandbox.node_id):
            if self._nodes.is_lost(
                sandbox.node_id
            ):  # asking would take seconds for each of hundreds
                raise UnavailableError(f"the node {sandbox.node_id} is away")
            node: NodeControl = self._nodes.get(sandbox.node_id)
            await node.do(EnsureGone(sandbox.id, incarnation=sandbox.incarnation))
        await self._lifecycle.apply(sandbox, Event.GONE, lease=claim.lease, ip=None, reason=None)


def _is_of_the_node(wish: MachineWish, error: SandyardError) -> bool:
    """Tell whether a start failed because of the node itself: not because of a user's snapshot or
    workspace, and not for lack of capacity."""
    is_plain = wish.origin is Origin.NEW and not wish.mounts
    return is_plain and not isinstance(error, NoCapacityError)


def wish_of(sandbox: Sandbox) -> MachineWish:
    """Return the desired state of a sandbox's machine."""
    origin = Origin.OWN if sandbox.status is Status.RESUMING else Origin.NEW
    if (
        sandbox.from_snapshot_id is not None
        and sandbox.from_snapshot_incarnation == sandbox.incarnation
    ):
        origin = Origin.SNAPSHOT
    elif origin is Origin.OWN and sandbox.from_disk_incarnation in (
        sandbox.incarnation,
        NEXT_START,
    ):
        origin = Origin.DISK
    return MachineWish(
        sandbox_id=sandbox.id,
        incarnation=sandbox.incarnation,
        version=sandbox.version,
        template=sandbox.template,
        shape=sandbox.shape,
        hostname=hostname_of(sandbox.name, sandbox.id),
        org_id=sandbox.org_id,
        env=sandbox.env,
        authorized_keys=sandbox.authorized_keys,
        root_password_hash=sandbox.root_password_hash,
        origin=origin,
        policy=sandbox.network.bare,
        snapshot_id=sandbox.from_snapshot_id if origin is Origin.SNAPSHOT else None,
        # One that ran before gets its own keys and password back.
        replaces_access=origin is Origin.SNAPSHOT and sandbox.started_at is None,
    )
