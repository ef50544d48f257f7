"""Sandboxes as their owners use them: create, get, list, delete, run a command, look at figures."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from sandyard.server.core.contracts import (
    Bus,
    Clock,
    NodeTunnel,
    Store,
    TemplateFact,
    TemplateStatus,
)
from sandyard.server.core.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from sandyard.server.core.ids import (
    check_name,
    check_tags,
    check_text,
    is_sandbox_id,
    is_uuid,
    new_sandbox_id,
    new_uuid,
)
from sandyard.server.core.records import Activity, Sandbox, SandboxQuery
from sandyard.server.core.shapes import shape_of
from sandyard.server.core.sshkeys import check_public_key, is_literal_key
from sandyard.server.core.states import ON_ITS_WAY_UP, Event, Status, Wanted
from sandyard.server.core.wire import Op
from sandyard.server.service.access import Actor
from sandyard.server.service.execute import Command, Outcome, execute
from sandyard.server.service.lifecycle import Lifecycle, check_status, topic_of
from sandyard.server.service.placement import Placement

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_MAX = 64 * 1024
_METADATA_MAX = 16 * 1024
_SSH_KEYS_MAX = 100
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
_SLICE_S = 1.0


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


@dataclass(frozen=True)
class Waits:
    """How long requests wait for others' work."""

    delete_s: float = 60.0
    start_s: float = 60.0


class Sandboxes:
    """The use cases. Every one names its actor and answers nothing of another organization's."""

    def __init__(
        self,
        *,
        store: Store,
        placement: Placement,
        tunnel: NodeTunnel,
        lifecycle: Lifecycle,
        bus: Bus,
        clock: Clock,
        hash_password: Callable[[str], Awaitable[str]],
        waits: Waits,
    ) -> None:
        self._store = store
        self._placement = placement
        self._tunnel = tunnel
        self._lifecycle = lifecycle
        self._bus = bus
        self._clock = clock
        self._hash_password = hash_password
        self._waits = waits

    async def create(self, actor: Actor, wish: NewSandbox) -> Sandbox:
        """Store a sandbox that wants to run and return it; starting it is the reconciler's work.

        Raises:
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
            AlreadyExistsError: the name is taken.
            UnavailableError: the template is not built, or the host has no room.
        """
        actor.require("sandbox:create")
        now = self._clock.now()
        name = None if wish.name is None else check_name(wish.name)
        tags = check_tags(wish.tags)
        env = _checked_env(wish.env)
        keys = _checked_keys(wish.ssh_keys)
        if wish.idle_timeout_s not in _IDLE_TIMEOUT_S:
            raise InvalidArgumentError(
                "cannot use idleTimeout: 0 (never) to 604800 seconds are possible",
                field="idleTimeout",
            )
        if wish.metadata_size > _METADATA_MAX:
            raise InvalidArgumentError("cannot keep over 16 KiB of metadata", field="metadata")
        template = await self._template(wish.template)
        shape = shape_of(template.defaults, vcpus=wish.vcpus, memory=wish.memory, disk=wish.disk)
        project_id = await self._project(actor, wish.project_id)
        password_hash = await self._password_hash(wish.root_password)
        sandbox = Sandbox(
            id=new_sandbox_id(),
            org_id=actor.org_id,
            owner_user_id=actor.user_id,
            project_id=project_id,
            name=name,
            status=Status.PENDING,
            wanted=Wanted.RUNNING,
            version=1,
            incarnation=1,
            template=wish.template,
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
            expires_at=None
            if wish.expires_in_s is None
            else now + timedelta(seconds=wish.expires_in_s),
        )
        await self._placement.choose(sandbox).check_room(shape)
        return await self._lifecycle.begin(sandbox, actor)

    async def get(self, actor: Actor, reference: str) -> Sandbox:
        """Return a sandbox by id or name.

        Raises:
            NotFoundError: absent, destroyed, another organization's or, for a member, another
                member's.
        """
        actor.require("sandbox:read")
        return await self._find(actor, reference)

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
        sandbox = await self._find(actor, reference)
        for _ in range(_TRIES):
            if sandbox.status in (Status.DESTROYING, Status.DESTROYED):
                break
            moved = await self._lifecycle.apply(
                sandbox, Event.DELETE, actor=actor, wanted=Wanted.GONE
            )
            sandbox = moved or await self._reread(sandbox.id)
        if not wait:
            return sandbox
        return await self._wait_for(
            sandbox, frozenset({Status.DESTROYED}), limit_s=self._waits.delete_s
        )

    async def wait_until_up(self, sandbox: Sandbox, *, limit_s: float) -> Sandbox:
        """Return a sandbox once it is no longer on its way up, at the limit as it is then."""
        settled = frozenset(Status) - ON_ITS_WAY_UP
        try:
            return await self._wait_for(sandbox, settled, limit_s=limit_s)
        except DeadlineExceededError:
            return await self._reread(sandbox.id)

    async def execute(self, actor: Actor, reference: str, command: Command) -> Outcome:
        """Run a command. See service.execute.execute.

        Raises:
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
            NotFoundError: see `get`.
            ConflictError: the sandbox does not run.
        """
        actor.require("sandbox:write")
        _check_command(command)
        sandbox = await self._running(actor, reference, wanted="run a command in")
        # Before it starts: a command whose audit cannot be written is not run, and is not run
        # twice by a caller who tries again.
        await self._note_use(actor, sandbox, "exec")
        return await execute(self._tunnel, sandbox, command)

    async def stats(self, actor: Actor, reference: str) -> tuple[Sandbox, Mapping[str, float]]:
        """Return a sandbox's figures, read in the guest now.

        Raises:
            NotFoundError: see `get`.
            ConflictError: the sandbox does not run.
            UnavailableError: the agent does not answer.
        """
        actor.require("sandbox:read")
        sandbox = await self._running(actor, reference, wanted="read the figures of")
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

    async def _find(self, actor: Actor, reference: str) -> Sandbox:
        async with self._store.read() as tx:
            if is_sandbox_id(reference):
                sandbox = await tx.sandboxes.find(reference)
            else:
                sandbox = await tx.sandboxes.find_named(actor.org_id, reference)
        if sandbox is None or not _may_see(actor, sandbox):
            raise NotFoundError(f"cannot find the sandbox {reference[:80]!r}: check id or name")
        return sandbox

    async def _reread(self, sandbox_id: str) -> Sandbox:
        async with self._store.read() as tx:
            sandbox = await tx.sandboxes.find(sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"cannot find the sandbox {sandbox_id}")
        return sandbox

    async def _wait_for(
        self, sandbox: Sandbox, statuses: frozenset[Status], *, limit_s: float
    ) -> Sandbox:
        until = self._clock.monotonic() + limit_s
        with self._bus.subscribe(topic_of(sandbox.id)) as changes:
            while True:
                sandbox = await self._reread(sandbox.id)
                if sandbox.status in statuses:
                    return sandbox
                left = until - self._clock.monotonic()
                if left <= 0:
                    raise DeadlineExceededError(
                        f"cannot wait longer for {sandbox.id}: it is still {sandbox.status}; "
                        "ask again in a while"
                    )
                # Looked at now and then all the same: a hint may be lost.
                await changes.wait(min(left, _SLICE_S))

    async def _running(self, actor: Actor, reference: str, *, wanted: str) -> Sandbox:
        sandbox = await self._find(actor, reference)
        if sandbox.status in ON_ITS_WAY_UP:
            sandbox = await self.wait_until_up(sandbox, limit_s=self._waits.start_s)
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
                project = await tx.accounts.find_project(actor.org_id, project_id)
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


def _may_see(actor: Actor, sandbox: Sandbox) -> bool:
    return (
        sandbox.org_id == actor.org_id
        and sandbox.status is not Status.DESTROYED
        and (actor.sees_all or sandbox.owner_user_id == actor.user_id)
    )


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


def _checked_keys(keys: list[str] | None) -> tuple[str, ...]:
    if keys is None:
        return ()
    if len(keys) > _SSH_KEYS_MAX:
        raise InvalidArgumentError("cannot take over 100 SSH keys", field="sshKeys")
    checked = []
    for key in keys:
        check_text(key, field="sshKeys")
        if not is_literal_key(key):
            raise InvalidArgumentError(
                f"cannot use the SSH key {key[:80]!r}: no key of the organization has this id, "
                "and it is not a public key itself",
                field="sshKeys",
            )
        checked.append(check_public_key(key, field="sshKeys"))
    return tuple(checked)


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
