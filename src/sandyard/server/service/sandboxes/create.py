"""Creates sandboxes: validates, prices, places and stores the request, then starts the machine."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Protocol

from sandyard.server.core.contracts.store import Hold
from sandyard.server.core.egress import NO_RULES, Policy
from sandyard.server.core.errors import InternalError, InvalidArgumentError
from sandyard.server.core.ids import checked_name, checked_tags, checked_text, new_sandbox_id
from sandyard.server.core.records import Claim, Mount, Sandbox, Snapshot
from sandyard.server.core.shapes import Shape, shape_of
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.networks import check_use
from sandyard.server.service.placement import Placed
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.fields import (
    check_idle_timeout,
    check_metadata,
    checked_env,
    checked_password,
    project_of,
)
from sandyard.server.service.sandboxes.mounts import (
    check_workspaces,
    checked_mounts,
    still_there,
)
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.power import Power
from sandyard.server.service.sandboxes.register import Deadline, get_snapshot
from sandyard.server.service.sandboxes.worker import Worker, new_lease
from sandyard.server.service.templates.templates import Chosen


@dataclass(frozen=True)
class NewSandbox:
    """The request for a new sandbox; None means the default.

    `ssh_keys` are ids of the organization's keys, or literal keys. A sandbox from a `snapshot` has
    the snapshot's template and, by default, its mounts and network rules. What was `chosen` is not
    looked up again, and may be a template that others cannot name. `expires_in` counts from the
    request, or with `ends_from_start` from when the sandbox runs.
    """

    template: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    idle_timeout: int = 600
    vcpus: int | None = None
    memory: str | None = None
    disk: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    ssh_keys: list[str] | None = None
    root_password: str | None = field(default=None, repr=False)
    project_id: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    auto_resume: bool = True
    expires_in: int | None = None
    ends_from_start: bool = False
    pauses_at_end: bool = False
    keeps_memory: bool = True
    public_ports: bool = False
    port_host: str | None = None
    network: Policy | None = None
    snapshot: str | None = None
    mounts: tuple[Mount, ...] | None = None
    chosen: Chosen | None = None


DEFAULT_TEMPLATE = "base-ubuntu"


class KeyRing(Protocol):
    """Looks up the organizations' public keys."""

    async def resolve(
        self, actor: Actor, references: list[str] | None
    ) -> tuple[tuple[str, str], ...]:
        """Return the literal keys for ids and literal keys, or all keys of the organization for
        None. Each comes with its id, or an empty string if it was given literally.

        Raises:
            InvalidArgumentError: there is no such key, or a literal one is invalid.
        """
        ...


class Creation:
    """Creates sandboxes."""

    def __init__(
        self,
        platform: Platform,
        *,
        worker: Worker,
        power: Power,
        ssh_keys: KeyRing,
        hash_password: Callable[[str], Awaitable[str]],
        pooled_wait_s: float,
    ) -> None:
        self._store = platform.store
        self._register = platform.register
        self._placement = platform.placement
        self._templates = platform.templates
        self._lifecycle = platform.lifecycle
        self._worker = worker
        self._power = power
        self._quota = platform.quota
        self._networks = platform.networks
        self._ssh_keys = ssh_keys
        self._repeats = platform.repeats
        self._clock = platform.clock
        self._hash_password = hash_password
        self._pooled_wait_s = pooled_wait_s

    async def create(
        self,
        actor: Actor,
        wish: NewSandbox,
        *,
        request: Repeatable | None = None,
        wait_s: float = 0,
    ) -> Sandbox:
        """Store a new sandbox, start it, and return it.

        It is running if the pool had a machine, or if it has started within `wait_s`; otherwise it
        starts in the background. A repeated `request` returns what the first one created.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            AlreadyExistsError: the name is taken.
            LimitReachedError: a limit of the organization's plan is reached.
            QuotaExceededError: its credits do not suffice for about an hour.
            UnavailableError: the template is not built, or no node has capacity.
        """
        actor.require("sandbox:create")
        until = Deadline(self._clock, wait_s)
        claim, at_least_s = None, 0.0
        async with self._repeats.turn(actor, request):
            made = await self._made_before(actor, request)
            if made is None:
                sandbox, placed = await self._new(actor, wish)
                with new_lease(self._worker, sandbox.id) as hold:
                    made = await self._written(actor, sandbox, wish, request, hold)
                if made.id == sandbox.id:
                    claim = Claim(made, hold.lease)
                if placed.is_waiting:
                    at_least_s = self._pooled_wait_s
        if claim is not None:
            limit_s = max(until.left_s, at_least_s)
            await self._worker.run_now(claim, limit_s=limit_s)
            made = await self._register.reread(made.id) if limit_s > 0 else made
        return await self._power.until_up(made, limit_s=until.left_s) if wait_s > 0 else made

    async def forget(self, actor: Actor, request: Repeatable | None, sandbox: Sandbox) -> None:
        """Have the same request create another sandbox if it is repeated."""
        if request is not None:
            async with self._store.write(actor.org_id) as tx:
                await self._repeats.forget(tx, actor, request, (sandbox.id,))

    async def _written(
        self,
        actor: Actor,
        sandbox: Sandbox,
        wish: NewSandbox,
        request: Repeatable | None,
        hold: Hold,
    ) -> Sandbox:
        """Store a new sandbox, or return what the same request created meanwhile."""
        async with self._store.write(actor.org_id) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            if ids is not None:
                made = await tx.sandboxes.find(ids[0])
                if made is None:
                    raise InternalError(f"the sandbox {ids[0]} was made, and is not written down")
                return made
            sandbox = replace(sandbox, project_id=await project_of(tx, actor, wish.project_id))
            await self._quota.check_new(tx, actor, sandbox.shape)
            await check_workspaces(tx, sandbox.org_id, sandbox.mounts)
            sandbox = await self._lifecycle.begin(tx, sandbox, actor, hold=hold)
            await self._repeats.note(tx, actor, request, (sandbox.id,))
        return sandbox

    async def _made_before(self, actor: Actor, request: Repeatable | None) -> Sandbox | None:
        if request is None:
            return None
        async with self._store.write(actor.org_id) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            return await tx.sandboxes.find(ids[0]) if ids else None

    async def _new(self, actor: Actor, wish: NewSandbox) -> tuple[Sandbox, Placed]:
        """Return the requested sandbox, validated except for its project, and its node."""
        now = self._clock.now()
        check_idle_timeout(wish.idle_timeout)
        check_metadata(wish.metadata)
        name = None if wish.name is None else checked_name(wish.name)
        tags = checked_tags(wish.tags)
        env = checked_env(wish.env)
        network = (
            None if wish.network is None else await self._networks.checked(actor, wish.network)
        )
        password = None if wish.root_password is None else checked_password(wish.root_password)
        if wish.project_id is not None:
            async with self._store.glance() as tx:
                await project_of(tx, actor, wish.project_id)
        keys = await self._ssh_keys.resolve(actor, wish.ssh_keys)
        snapshot, template, shape = await self._source(actor, wish)
        if network is None:
            network = NO_RULES if snapshot is None else snapshot.network
            check_use(actor, network)
        self._quota.check_shape(actor, shape)
        mounts = await self._mounts(actor, wish, snapshot)
        password_hash = None if password is None else await self._hash_password(password)
        if snapshot is None:
            placed = await self._placement.choose(template, shape)
        else:
            placed = await self._placement.choose_for(snapshot, shape)
        lives = wish.expires_in
        sandbox = Sandbox(
            id=new_sandbox_id(),
            org_id=actor.org_id,
            owner_user_id=actor.user_id,
            project_id="",
            name=name,
            status=Status.CREATING,
            version=1,
            incarnation=1,
            template=template,
            shape=shape,
            idle_timeout_s=wish.idle_timeout,
            created_at=now,
            updated_at=now,
            tags=tags,
            env=env,
            authorized_keys=tuple(line for line, _ in keys),
            ssh_key_ids=tuple(key_id for _, key_id in keys),
            root_password_hash=password_hash,
            metadata=wish.metadata,
            auto_resume=wish.auto_resume,
            expires_at=None
            if lives is None or wish.ends_from_start
            else now + timedelta(seconds=lives),
            lives_s=lives,
            pauses_at_end=wish.pauses_at_end,
            keeps_memory=wish.keeps_memory,
            public_ports=wish.public_ports,
            port_host=wish.port_host,
            network=network,
            node_id=placed.node_id,
            from_snapshot_id=snapshot.id if snapshot else None,
            from_snapshot_incarnation=1 if snapshot else 0,
            mounts=mounts,
            is_test=actor.is_test,
            has_desktop=await self._templates.has_desktop(actor.org_id, template),
        )
        return sandbox, placed

    async def _mounts(
        self, actor: Actor, wish: NewSandbox, snapshot: Snapshot | None
    ) -> tuple[Mount, ...]:
        """Return the mounts, validated as far as possible now."""
        mounts = checked_mounts(actor, wish.mounts or ())
        kept = snapshot.mounts if wish.mounts is None and snapshot is not None else ()
        if not mounts and not kept:
            return ()
        async with self._store.read() as tx:
            if kept:
                return checked_mounts(actor, await still_there(tx, actor.org_id, kept))
            await check_workspaces(tx, actor.org_id, mounts)
        return mounts

    async def _source(self, actor: Actor, wish: NewSandbox) -> tuple[Snapshot | None, str, Shape]:
        """Return the snapshot (or None), the template and the shape."""
        if wish.snapshot is not None:
            snapshot = await get_snapshot(self._store, actor, wish.snapshot)
            return snapshot, snapshot.template, _shape_from(snapshot, wish)
        template = DEFAULT_TEMPLATE if wish.template is None else wish.template
        chosen = wish.chosen or await self._templates.choose(
            actor, checked_text(template, field="template")
        )
        shape = shape_of(chosen.defaults, vcpus=wish.vcpus, memory=wish.memory, disk=wish.disk)
        return None, chosen.name, shape


def _shape_from(snapshot: Snapshot, wish: NewSandbox) -> Shape:
    """Return the shape of a sandbox from a snapshot. Only its disk may be larger.

    Raises:
        InvalidArgumentError: the request asks for another shape.
    """
    shape = shape_of(snapshot.shape, vcpus=wish.vcpus, memory=wish.memory, disk=wish.disk)
    for what, is_other in (
        ("vcpus", shape.vcpus != snapshot.shape.vcpus),
        ("memory", shape.memory_mib != snapshot.shape.memory_mib),
    ):
        if is_other:
            raise InvalidArgumentError(
                f"cannot change {what}: a machine from a snapshot has what it was saved with; "
                f"leave resources.{what} out",
                field=f"resources.{what}",
            )
    if shape.disk_mib < snapshot.shape.disk_mib:
        raise InvalidArgumentError(
            f"cannot shrink the disk: the snapshot's has {snapshot.shape.disk_mib} MB",
            field="resources.disk",
        )
    slug = snapshot.template.partition("@")[0]
    if wish.template is not None and wish.template not in (snapshot.template, slug):
        raise InvalidArgumentError(
            f"cannot start {wish.template[:80]} from this snapshot: it is of {slug}; "
            "leave template out",
            field="template",
        )
    return shape
