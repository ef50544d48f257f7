"""Sandboxes as their owners use them: create, get, list, change, pause, resume, delete, run a
command, look at figures."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Protocol

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeTunnel, TemplateFact, TemplateStatus
from sandyard.server.core.contracts.store import Store, Transaction
from sandyard.server.core.errors import (
    Code,
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    NoCapacityError,
    PermissionDeniedError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import (
    check_name,
    check_tags,
    check_text,
    is_uuid,
    new_sandbox_id,
    new_uuid,
)
from sandyard.server.core.records import Activity, Claim, Sandbox, SandboxQuery, Snapshot
from sandyard.server.core.shapes import Shape, shape_of
from sandyard.server.core.states import ON_ITS_WAY_UP, Event, Status, Wanted
from sandyard.server.core.wire import Op
from sandyard.server.service.actor import Actor
from sandyard.server.service.placement import Placement
from sandyard.server.service.repeats import Repeatable, Repeats
from sandyard.server.service.sandboxes.execute import (
    Command,
    NotBegunError,
    Outcome,
    execute,
)
from sandyard.server.service.sandboxes.lifecycle import Lifecycle, check_status
from sandyard.server.service.sandboxes.quota import Admission
from sandyard.server.service.sandboxes.register import Register, find_snapshot
from sandyard.server.service.sandboxes.uses import Uses
from sandyard.server.service.sandboxes.worker import Worker

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_MAX = 64 * 1024
_METADATA_MAX = 16 * 1024
_COMMAND_MAX = 128 * 1024 - 1  # the kernel's limit for one argument (MAX_ARG_STRLEN)
_PATH_MAX = 4096
_TIMEOUT_MS = range(1, 3_600_001)
_PASSWORD_BYTES = range(8, 73)
_IDLE_TIMEOUT_S = range(604_801)
_TRIES = 8
_FIGURE_MAX = 2.0**63
_FIGURES = (
    "cpuPercent", "memoryUsedBytes", "memoryTotalBytes", "diskUsedBytes", "diskTotalBytes",
    "uptime",
)  # fmt: skip
_LONG_MS = 2000
_ALL = frozenset(Status)


@dataclass(frozen=True)
class NewSandbox:
    """What a caller asks for; None means the default."""

    template: str = "base-ubuntu"
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    idle_timeout_s: int = 600
    vcpus: int | None = None
    memory: str | None = None
    disk: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    ssh_keys: list[str] | None = None
    root_password: str | None = field(default=None, repr=False)
    project_id: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    metadata_size: int = 0
    auto_resume: bool = True
    expires_in_s: int | None = None
    snapshot: str | None = None
    names_template: bool = False


@dataclass(frozen=True)
class Changes:
    """What is to be changed in a sandbox; None leaves a field as it is, but for the name.

    `renames` says whether the name is to be changed; None as a name then takes it away.
    """

    renames: bool = False
    name: str | None = None
    tags: list[str] | None = None
    idle_timeout_s: int | None = None
    metadata: Mapping[str, object] | None = None
    metadata_size: int = 0
    project_id: str | None = None
    auto_resume: bool | None = None


@dataclass(frozen=True)
class Waits:
    """How long requests wait for others' work."""

    delete_s: float = 60.0
    start_s: float = 60.0
    pause_s: float = 60.0
    pooled_s: float = 2.0


class KeyRing(Protocol):
    """Knows the organizations' public keys."""

    async def resolve(self, actor: Actor, references: list[str] | None) -> tuple[str, ...]:
        """Return the literal keys that ids and literal keys stand for, all of them for None.

        Raises:
            InvalidArgumentError: there is no such key, or a literal one cannot be used.
        """
        ...


class Sandboxes:
    """The use cases. Every one names its actor and answers nothing of another organization's."""

    def __init__(
        self,
        *,
        store: Store,
        register: Register,
        placement: Placement,
        tunnel: NodeTunnel,
        lifecycle: Lifecycle,
        worker: Worker,
        uses: Uses,
        admission: Admission,
        ssh_keys: KeyRing,
        repeats: Repeats,
        bus: Bus,
        clock: Clock,
        hash_password: Callable[[str], Awaitable[str]],
        waits: Waits,
    ) -> None:
        self._store = store
        self._register = register
        self._placement = placement
        self._tunnel = tunnel
        self._lifecycle = lifecycle
        self._worker = worker
        self._uses = uses
        self._admission = admission
        self._ssh_keys = ssh_keys
        self._repeats = repeats
        self._bus = bus
        self._clock = clock
        self._hash_password = hash_password
        self._waits = waits

    async def create(
        self, actor: Actor, wish: NewSandbox, *, request: Repeatable | None = None
    ) -> Sandbox:
        """Store a sandbox that wants to run, have it started, and return it.

        It runs when this returns if a machine waited for it, else it starts meanwhile. A `request`
        that was made before is answered with what it made.

        Raises:
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
            AlreadyExistsError: the name is taken.
            LimitReachedError: the organization has as many as its plan allows.
            QuotaExceededError: its credits do not suffice for about an hour.
            UnavailableError: the template is not built, or the host has no room.
        """
        actor.require("sandbox:create")
        async with self._repeats.turn(actor, request):
            return await self._create(actor, wish, request)

    async def _create(self, actor: Actor, wish: NewSandbox, request: Repeatable | None) -> Sandbox:
        if (made := await self._made_before(actor, request)) is not None:
            return made
        sandbox = await self._new(actor, wish)
        node = self._placement.choose(sandbox)
        is_waiting = await node.check_room(sandbox.template, sandbox.shape)
        hold = self._worker.hold()
        sandbox = replace(sandbox, status=Status.CREATING, node_id=node.node_id)
        async with self._store.write() as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            if ids is not None:
                return await tx.sandboxes.find(ids[0]) or sandbox
            await self._admission.check_new(tx, actor, sandbox.shape)
            await _check_project(tx, sandbox)
            sandbox = await self._lifecycle.begin(tx, sandbox, actor, hold=hold)
            await self._repeats.note(tx, actor, request, (sandbox.id,))
        can_wait = is_waiting and wish.snapshot is None
        await self._worker.take_up(
            Claim(sandbox, hold.lease), limit_s=self._waits.pooled_s if can_wait else 0
        )
        return await self._register.reread(sandbox.id) if can_wait else sandbox

    async def _made_before(self, actor: Actor, request: Repeatable | None) -> Sandbox | None:
        if request is None:
            return None
        async with self._store.write() as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            return await tx.sandboxes.find(ids[0]) if ids else None

    async def _new(self, actor: Actor, wish: NewSandbox) -> Sandbox:
        """Return the sandbox that is asked for, everything about it checked."""
        now = self._clock.now()
        _check_idle_timeout(wish.idle_timeout_s)
        _check_metadata(wish.metadata_size)
        name = None if wish.name is None else check_name(wish.name)
        tags = check_tags(wish.tags)
        env = _checked_env(wish.env)
        keys = await self._ssh_keys.resolve(actor, wish.ssh_keys)
        if wish.snapshot is None:
            template = await self._template(wish.template)
            slug, snapshot_id = wish.template, None
            shape = shape_of(
                template.defaults, vcpus=wish.vcpus, memory=wish.memory, disk=wish.disk
            )
        else:
            snapshot = await find_snapshot(self._store, actor, wish.snapshot)
            slug, snapshot_id = snapshot.template, snapshot.id
            shape = _shape_from(snapshot, wish)
        self._admission.check_shape(actor, shape)
        project_id = await self._project(actor, wish.project_id)
        password_hash = await self._password_hash(wish.root_password)
        lives = wish.expires_in_s
        return Sandbox(
            id=new_sandbox_id(),
            org_id=actor.org_id,
            owner_user_id=actor.user_id,
            project_id=project_id,
            name=name,
            status=Status.PENDING,
            wanted=Wanted.RUNNING,
            version=1,
            incarnation=1,
            template=slug,
            shape=shape,
            idle_timeout_s=wish.idle_timeout_s,
            created_at=now,
            updated_at=now,
            tags=tags,
            env=env,
            ssh_keys=keys,
            root_password_hash=password_hash,
            metadata=wish.metadata,
            auto_resume=wish.auto_resume,
            expires_at=None if lives is None else now + timedelta(seconds=lives),
            from_snapshot_id=snapshot_id,
            from_snapshot_at=1 if snapshot_id else 0,
            is_test=actor.is_test,
        )

    async def get(self, actor: Actor, reference: str) -> Sandbox:
        """Return a sandbox by id or name.

        Raises:
            NotFoundError: absent, destroyed, another organization's or, for a member, another
                member's.
        """
        actor.require("sandbox:read")
        return await self._register.find(actor, reference)

    async def page(self, actor: Actor, query: SandboxQuery, *, wants_all: bool) -> list[Sandbox]:
        """Return one page of the actor's sandboxes, or of the whole organization's.

        Raises:
            PermissionDeniedError: all are wanted by one who may not see them.
        """
        actor.require("sandbox:read")
        if wants_all and not actor.sees_all:
            raise PermissionDeniedError(
                "cannot list all of the organization's sandboxes: that takes the role admin or "
                "the scope admin:resources",
                requiredScope="admin:resources",
            )
        async with self._store.read() as tx:
            return await tx.sandboxes.page(query)

    async def delete(self, actor: Actor, reference: str, *, wait: bool) -> Sandbox:
        """Have a sandbox destroyed, from whatever status it is in; with `wait`, until it is gone.

        Raises:
            NotFoundError: see `get`.
            DeadlineExceededError: it is not gone yet; it will be.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.find(actor, reference)
        for _ in range(_TRIES):
            if sandbox.status in (Status.DESTROYING, Status.DESTROYED):
                break
            # The name of one that was lost may be another's by now.
            kept = {"name": None} if sandbox.status is Status.ORPHANED else {}
            moved = await self._lifecycle.apply(
                sandbox, Event.DELETE, actor=actor, wanted=Wanted.GONE, **kept
            )
            sandbox = moved or await self._register.reread(sandbox.id)
        if not wait:
            return sandbox
        return await self._register.wait_for(
            sandbox, frozenset({Status.DESTROYED}), limit_s=self._waits.delete_s
        )

    async def wait_until_up(self, sandbox: Sandbox, *, limit_s: float) -> Sandbox:
        """Return a sandbox once it is no longer on its way up, at the limit as it is then."""
        settled = frozenset(Status) - ON_ITS_WAY_UP
        try:
            return await self._register.wait_for(sandbox, settled, limit_s=limit_s)
        except DeadlineExceededError:
            return await self._register.reread(sandbox.id)

    async def pause(self, actor: Actor, reference: str, *, wait: bool = True) -> Sandbox:
        """Have a running sandbox saved to disk and its memory given back; at once if it is.

        Raises:
            NotFoundError: see `get`.
            ConflictError: its status does not allow it.
            UnavailableError: it could not be paused, and runs on.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.find(actor, reference)
        for _ in range(_TRIES):
            if sandbox.status is Status.PAUSING and wait:
                sandbox = await self._register.wait_for(
                    sandbox, _ALL - {Status.PAUSING}, limit_s=self._waits.pause_s
                )
                if sandbox.status is Status.RUNNING:
                    raise _not_done(sandbox, "pause")
            if sandbox.status in (Status.PAUSED, Status.PAUSING):
                return sandbox
            if sandbox.status is not Status.RUNNING:
                raise check_status(sandbox, wanted="pause")
            hold = self._worker.hold()
            pausing = await self._lifecycle.apply(
                sandbox, Event.PAUSE, actor=actor, hold=hold, wanted=Wanted.PAUSED
            )
            if pausing is not None:
                limit_s = self._waits.pause_s if wait else 0
                await self._worker.take_up(Claim(pausing, hold.lease), limit_s=limit_s)
            sandbox = await self._register.reread(sandbox.id)
            if pausing is not None and sandbox.status is Status.RUNNING and sandbox.reason:
                raise _not_done(sandbox, "pause")
        return sandbox

    async def resume(self, actor: Actor, reference: str, *, wait: bool = True) -> Sandbox:
        """Have a paused sandbox go on where it stood, or one in error boot from its disk.

        Raises:
            NotFoundError: see `get`.
            ConflictError: its status does not allow it.
            LimitReachedError, QuotaExceededError: see `create`.
            UnavailableError: it could not be resumed, and is still what it was.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.find(actor, reference)
        return await self._bring_back(sandbox, actor, wait=wait)

    async def _bring_back(self, sandbox: Sandbox, actor: Actor, *, wait: bool = True) -> Sandbox:
        """See `resume`. However many ask at once, there is one resume, which all wait for."""
        limit_s = self._waits.start_s
        for _ in range(_TRIES):
            if sandbox.status is Status.PAUSING:
                sandbox = await self._register.wait_for(
                    sandbox, _ALL - {Status.PAUSING}, limit_s=limit_s
                )
            if sandbox.status is Status.RESUMING and wait:
                sandbox = await self._register.wait_for(
                    sandbox, _ALL - {Status.RESUMING}, limit_s=limit_s
                )
                if sandbox.status in (Status.PAUSED, Status.ERROR):
                    raise _not_done(sandbox, "resume")
            if sandbox.status in (Status.RUNNING, Status.RESUMING):
                return sandbox
            if sandbox.status not in (Status.PAUSED, Status.ERROR):
                raise check_status(sandbox, wanted="resume")
            hold = self._worker.hold()
            resuming = await self._lifecycle.apply(
                sandbox,
                Event.RESUME,
                actor=actor,
                hold=hold,
                check=partial(
                    self._admission.check_resume,
                    actor=actor,
                    shape=sandbox.shape,
                    is_test=sandbox.is_test,
                ),
                incarnation=sandbox.incarnation + 1,
                wanted=Wanted.RUNNING,
            )
            if resuming is not None:
                await self._worker.take_up(
                    Claim(resuming, hold.lease), limit_s=limit_s if wait else 0
                )
            sandbox = await self._register.reread(sandbox.id)
            if resuming is not None and sandbox.status in (Status.PAUSED, Status.ERROR):
                raise _not_done(sandbox, "resume")
        return sandbox

    async def touch(self, actor: Actor, reference: str) -> Sandbox:
        """Count as a use of a sandbox, so that it is not paused for being idle.

        Raises:
            NotFoundError: see `get`.
            ConflictError: it does not run, so that nothing can keep it running.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.find(actor, reference)
        if sandbox.status is not Status.RUNNING and sandbox.status not in ON_ITS_WAY_UP:
            raise check_status(sandbox, wanted="touch")
        async with self._store.write() as tx:
            await tx.activity.touch(sandbox.id, at=self._clock.now(), kind="touch")
        return await self._register.reread(sandbox.id)

    async def change(self, actor: Actor, reference: str, changes: Changes) -> Sandbox:
        """Change what a sandbox is called and how it is treated; its machine is left alone.

        Raises:
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
            AlreadyExistsError: the name is taken.
            NotFoundError: see `get`.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.find(actor, reference)
        wanted: dict[str, object] = {}
        if changes.renames:
            wanted["name"] = None if changes.name is None else check_name(changes.name)
        if changes.tags is not None:
            wanted["tags"] = check_tags(changes.tags)
        if changes.idle_timeout_s is not None:
            _check_idle_timeout(changes.idle_timeout_s)
            wanted["idle_timeout_s"] = changes.idle_timeout_s
        if changes.metadata is not None:
            _check_metadata(changes.metadata_size)
            wanted["metadata"] = changes.metadata
        if changes.project_id is not None:
            wanted["project_id"] = await self._project(actor, changes.project_id)
        if changes.auto_resume is not None:
            wanted["auto_resume"] = changes.auto_resume
        if not wanted:
            return sandbox
        for _ in range(_TRIES):
            changed = await self._lifecycle.change(
                sandbox, actor=actor, retag="tags" in wanted, check=_check_project, **wanted
            )
            if changed is not None:
                return await self._register.reread(sandbox.id)
            sandbox = await self._register.find(actor, sandbox.id)
        raise UnavailableError(f"cannot change {sandbox.id} now: it changes all the time")

    async def execute(self, actor: Actor, reference: str, command: Command) -> Outcome:
        """Run a command; one that is paused is resumed first. See service.execute.execute.

        Raises:
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
            NotFoundError: see `get`.
            ConflictError: the sandbox does not run, or was paused while the command ran.
        """
        actor.require("sandbox:write")
        _check_command(command)
        for _ in range(_TRIES):
            sandbox = await self._running(actor, reference, wanted="run a command in")
            with self._uses.use(sandbox.id):
                # Before it starts: a command whose audit cannot be written is not run, and is not
                # run twice by a caller who tries again.
                await self._note_use(actor, sandbox, "exec")
                try:
                    outcome = await execute(self._tunnel, sandbox, command)
                except NotBegunError as error:
                    # Paused at this very moment? Then it is resumed, and nothing was started yet.
                    again = await self._register.reread(sandbox.id)
                    if again.version == sandbox.version:
                        raise ConflictError(error.message, **error.facts) from error
                    continue
                if outcome.duration_ms > _LONG_MS:
                    async with self._store.write() as tx:
                        await tx.activity.touch(sandbox.id, at=self._clock.now(), kind="exec")
                return outcome
        raise UnavailableError(f"cannot run a command in {reference[:80]}: it changes all the time")

    async def stats(self, actor: Actor, reference: str) -> tuple[Sandbox, Mapping[str, float]]:
        """Return a sandbox's figures, read in the guest now.

        Raises:
            NotFoundError: see `get`.
            ConflictError: the sandbox does not run.
            UnavailableError: the agent does not answer.
        """
        actor.require("sandbox:read")
        # To be looked at is no use of a sandbox: it is neither waited for nor resumed.
        sandbox = await self._register.find(actor, reference)
        if sandbox.status is not Status.RUNNING:
            raise check_status(sandbox, wanted="read the figures of")
        async with self._tunnel.open(
            sandbox.id, incarnation=sandbox.incarnation, op=Op.STATS, args={}
        ) as opened:
            values = opened.values
        figures = {}
        for name in _FIGURES:
            value = values.get(name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < _FIGURE_MAX
            ):
                raise UnavailableError("cannot read the figures: the agent told none")
            figures[name] = value
        return sandbox, figures

    # --- parts ----------------------------------------------------------------------------

    async def _running(self, actor: Actor, reference: str, *, wanted: str) -> Sandbox:
        """Return a sandbox that runs, having waited for it or resumed it if need be."""
        sandbox = await self._register.find(actor, reference)
        if sandbox.status is Status.RUNNING:
            return sandbox
        if sandbox.status is Status.PAUSING:
            sandbox = await self._register.wait_for(
                sandbox, _ALL - {Status.PAUSING}, limit_s=self._waits.pause_s
            )
        if sandbox.status in (Status.PAUSED, Status.RESUMING) and sandbox.auto_resume:
            sandbox = await self._bring_back(sandbox, actor)
        if sandbox.status in ON_ITS_WAY_UP:
            sandbox = await self.wait_until_up(sandbox, limit_s=self._waits.start_s)
        if sandbox.status is Status.PAUSED and not sandbox.auto_resume:
            raise ConflictError(
                f"cannot {wanted} {sandbox.id}: it is paused and its autoResume is off; "
                "resume it first",
                status=sandbox.status.value,
            )
        if sandbox.status is not Status.RUNNING:
            raise check_status(sandbox, wanted=wanted)
        return sandbox

    async def _template(self, slug: str) -> TemplateFact:
        known: list[str] = []
        for node in self._placement.all():
            for fact in await node.templates():
                known.append(fact.slug)
                if fact.slug == slug:
                    if fact.status is TemplateStatus.READY:
                        return fact
                    raise UnavailableError(
                        f"cannot start from the template {slug} yet: it is {fact.status}; "
                        f"run `sandyard template build {slug}` on the host and ask again"
                    )
        raise InvalidArgumentError(
            f"cannot use the template {slug[:80]!r}: known are {', '.join(sorted(set(known)))}",
            field="template",
        )

    async def _project(self, actor: Actor, project_id: str | None) -> str:
        project = None
        if project_id is None or is_uuid(project_id):
            async with self._store.read() as tx:
                project = await tx.projects.find(actor.org_id, project_id)
        if project is None:
            raise InvalidArgumentError(
                "cannot use projectId: the organization has no such project", field="projectId"
            )
        return project.id

    async def _password_hash(self, password: str | None) -> str | None:
        if password is None:
            return None
        check_text(password, field="rootPassword")
        if len(password.encode()) not in _PASSWORD_BYTES or not password.isprintable():
            raise InvalidArgumentError(
                "cannot use rootPassword: it needs 8 to 72 bytes of printable characters",
                field="rootPassword",
            )
        return await self._hash_password(password)

    async def _note_use(self, actor: Actor, sandbox: Sandbox, kind: str) -> None:
        now = self._clock.now()
        async with self._store.write() as tx:
            await tx.activity.touch(sandbox.id, at=now, kind=kind)
            await tx.activity.append(
                Activity(
                    id=new_uuid(),
                    org_id=sandbox.org_id,
                    actor_user_id=actor.user_id,
                    actor_type=actor.kind,
                    event_type=f"sandbox.{kind}",
                    resource_type="sandbox",
                    resource_id=sandbox.id,
                    severity="info",
                    status=sandbox.status.value,
                    title="Command run",
                    summary="",
                    created_at=now,
                    sandbox_id=sandbox.id,
                )
            )


async def _check_project(tx: Transaction, sandbox: Sandbox) -> None:
    """Refuse a project that was deleted since it was looked up."""
    if await tx.projects.find(sandbox.org_id, sandbox.project_id) is None:
        raise InvalidArgumentError(
            "cannot use projectId: the project was deleted at this moment", field="projectId"
        )


def _not_done(sandbox: Sandbox, what: str) -> SandyardError:
    """Return the error for a step that failed and left the sandbox as it was."""
    reason = sandbox.reason
    why = reason.message if reason else "it was asked for something else meanwhile"
    message = f"cannot {what} {sandbox.id}: {why}; it is {sandbox.status} as before"
    if reason is not None and reason.code in (Code.NO_CAPACITY, "host_disk_full"):
        return NoCapacityError(message)
    return UnavailableError(message)


def _shape_from(snapshot: Snapshot, wish: NewSandbox) -> Shape:
    """Return the shape of a sandbox from a snapshot: its disk may be larger, all else is as it was.

    Raises:
        InvalidArgumentError: something else is asked for.
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
    if wish.names_template and wish.template != snapshot.template:
        raise InvalidArgumentError(
            f"cannot start {wish.template[:80]} from this snapshot: it is of {snapshot.template}; "
            "leave template out",
            field="template",
        )
    return shape


def _check_idle_timeout(seconds: int) -> None:
    if seconds not in _IDLE_TIMEOUT_S:
        raise InvalidArgumentError(
            "cannot use idleTimeout: 0 (never) to 604800 seconds are possible",
            field="idleTimeout",
        )


def _check_metadata(size: int) -> None:
    if size > _METADATA_MAX:
        raise InvalidArgumentError("cannot keep over 16 KiB of metadata", field="metadata")


def _checked_env(env: Mapping[str, str]) -> Mapping[str, str]:
    size = 0
    for name, value in env.items():
        check_text(name, field="env")
        check_text(value, field="env")
        if not _ENV_NAME.fullmatch(name):
            raise InvalidArgumentError(
                f"cannot set the variable {name[:80]!r}: a name is letters, digits and _ and "
                "does not start with a digit",
                field="env",
            )
        size += len(name.encode()) + len(value.encode()) + 2
    if size > _ENV_MAX:
        raise InvalidArgumentError("cannot keep over 64 KiB of env", field="env")
    return dict(env)


def _check_command(command: Command) -> None:
    check_text(command.command, field="command")
    check_text(command.cwd, field="cwd")
    check_text(command.user, field="user")
    if not command.command.strip():
        raise InvalidArgumentError("cannot run an empty command", field="command")
    if len(command.command.encode()) > _COMMAND_MAX:
        raise InvalidArgumentError(
            "cannot run a command of over 128 KiB: write it to a file and run that",
            field="command",
        )
    if command.timeout_ms not in _TIMEOUT_MS:
        raise InvalidArgumentError(
            "cannot use timeout: 1 to 3600000 milliseconds are possible", field="timeout"
        )
    if not command.cwd.startswith("/") or len(command.cwd) > _PATH_MAX:
        raise InvalidArgumentError("cannot use cwd: it must start with /", field="cwd")
    if not 1 <= len(command.user) <= 64:
        raise InvalidArgumentError("cannot use user: it is a name or a number", field="user")
    if command.stdin is not None:
        try:
            command.stdin.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                "cannot use stdin: it is not valid Unicode", field="stdin"
            ) from error
    _checked_env(command.env)
