"""Builds of templates: requested, listed, followed and cancelled. `building` carries them out."""

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from datetime import timedelta
from typing import Any, Final

from sandyard.server.core.codec import decode, encode
from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.egress import Policy
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    LimitReachedError,
    NotFoundError,
)
from sandyard.server.core.ids import check_slug, is_uuid, new_uuid
from sandyard.server.core.plans import Plan
from sandyard.server.core.records import (
    ACTIVE_BUILDS,
    Build,
    BuildLine,
    BuildStatus,
    Template,
)
from sandyard.server.core.shapes import Shape, shape_of
from sandyard.server.service.actor import Actor, plan_of
from sandyard.server.service.builds.credentials import RegistryCredentials
from sandyard.server.service.builds.plan import (
    NewFile,
    NewTemplate,
    Step,
    StepKind,
    check_plan,
    check_tags,
)
from sandyard.server.service.builds.steps import check_steps
from sandyard.server.service.builds.uploads import Uploads
from sandyard.server.service.lines import line
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.templates.templates import Templates, check_count

WORK: Final = "builds"
"""The topic of hints that some build wants work done."""
BUILDER: Final = "builder"
"""The hidden template in which images are unpacked."""
LIST_MAX: Final = 100
_WAITING_MAX: Final = 100
_QUEUED_MAX: Final = 20
"""Uploads are kept for a day: with a longer queue, one could be gone before its build begins."""
WAITS: Final = timedelta(hours=2)
"""How long an announced build waits for its steps."""
_ANNOUNCED: Final = ("tags", "vcpus", "memory", "disk")
"""What is known of a build that waits to be described."""
_DEFAULTS = Shape(1, 512, 5 * 1024)
_PAGE = 500
_SLICE_S = 1.0


def topic_of(build_id: str) -> str:
    """Return the topic of hints about one build."""
    return f"build:{build_id}"


class Builds:
    """The builds of organizations."""

    def __init__(
        self,
        platform: Platform,
        templates: Templates,
        uploads: Uploads,
        credentials: RegistryCredentials,
    ) -> None:
        self._credentials = credentials
        self._store = platform.store
        self._bus: Bus = platform.bus
        self._clock = platform.clock
        self._quota = platform.quota
        self._networks = platform.networks
        self._repeats = platform.repeats
        self._plans: Mapping[str, Plan] = platform.plans
        self._templates = templates
        self._uploads = uploads
        self._open = platform.opened

    def following(self, actor: Actor) -> AbstractContextManager[None]:
        """Count a client that follows a log, while the block lasts. See `Open.one`."""
        return self._open.one(actor.org_id)

    async def create(
        self, actor: Actor, wish: NewTemplate, *, request: Repeatable | None = None
    ) -> Build:
        """Request a new version of a template, which is created with its first one. A repeated
        `request` returns the build that the first one requested.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            ConflictError: a template that the build needs is not built.
            LimitReachedError: a limit of the organization's plan is reached.
            QuotaExceededError: its credits do not suffice for about an hour of the build.
        """
        actor.require("template:write")
        check_plan(wish)
        async with self._repeats.turn(actor, request):
            async with self._store.write(actor.org_id) as tx:
                ids = await self._repeats.made_before(tx, actor, request)
                made = await tx.builds.find(actor.org_id, ids[0]) if ids else None
            if made is not None:
                return made
            build = await self._new(actor, wish)
            async with self._store.write(actor.org_id) as tx:
                if ids:  # that build is no longer kept
                    await self._repeats.forget(tx, actor, request, tuple(ids))
                build = await self._add(tx, actor, build, wish)
                await self._repeats.note(tx, actor, request, (build.id,))
        self._bus.hint(WORK)
        return build

    async def announce(self, actor: Actor, wish: NewTemplate) -> Build:
        """Register a build whose steps follow within two hours, by `describe`; of `wish` the slug,
        the tags and the shape count. Until then the build is waiting.

        Raises: see `create`.
        """
        actor.require("template:write")
        check_slug(wish.slug)
        check_tags(wish.tags)
        await self._check_slug(wish.slug)
        self._shape(actor, _DEFAULTS, wish)
        known = {name: getattr(wish, name) for name in _ANNOUNCED}
        build = self._build(actor, wish.slug, BuildStatus.WAITING, known)
        async with self._store.write(actor.org_id) as tx:
            if await tx.builds.count(actor.org_id, BuildStatus.WAITING) >= _WAITING_MAX:
                raise LimitReachedError(
                    f"cannot announce another build: {_WAITING_MAX} are waiting for their steps; "
                    "cancel some, or wait: each ends after two hours",
                    limit=_WAITING_MAX,
                )
            return await self._add(tx, actor, build, wish)

    async def describe(self, actor: Actor, build_id: str, wish: NewTemplate) -> Build:
        """Set the source and the steps of an announced build, and queue it. Its tags and its shape
        are those that it was announced with.

        Raises: see `create`; and
            NotFoundError: there is no such build of the template.
            ConflictError: it was described before, or it has ended.
        """
        actor.require("template:write")
        found = await self.get(actor, wish.slug, build_id)
        async with self._store.read() as tx:
            known = await tx.builds.waiting(actor.org_id, build_id)
        if known is None:
            raise _not_waiting(found)
        values: dict[str, Any] = {name: known.plan[name] for name in _ANNOUNCED}
        wish = replace(wish, **values | {"tags": tuple(values["tags"])})
        check_plan(wish)
        build = replace(
            await self._new(actor, wish),
            id=known.id,
            number=known.number,
        )
        async with self._store.write(actor.org_id) as tx:
            template = await tx.templates.find(actor.org_id, wish.slug)
            if template is None or template.last_number < build.number:
                raise _not_waiting(found)  # the template was deleted meanwhile
            await self._check_limits(tx, actor, is_new=False)
            if not await tx.builds.describe(build):
                raise _not_waiting(found)
        self._bus.hint(topic_of(build.id))
        self._bus.hint(WORK)
        return build

    async def _add(self, tx: Transaction, actor: Actor, build: Build, wish: NewTemplate) -> Build:
        """Add a build, with its template if it is the first one."""
        template = await tx.templates.find(actor.org_id, wish.slug)
        await self._check_limits(tx, actor, is_new=template is None)
        now = self._clock.now()
        if template is None:
            template = Template(actor.org_id, wish.slug, wish.slug, "", now, now)
        check_count(template, wish.tags)
        build = replace(build, number=template.last_number + 1)
        description = template.description if wish.description is None else wish.description
        await tx.templates.put(
            replace(
                template,
                name=wish.name or template.name,
                description=description,
                updated_at=now,
                last_number=build.number,
            )
        )
        await tx.builds.add(build)
        await tx.activity.append(
            line(
                "template.build",
                "Template build requested",
                org_id=actor.org_id,
                actor=actor,
                resource_id=build.id,
                at=now,
                status=build.status.value,
                attributes={"template": wish.slug, "version": build.number},
            )
        )
        return build

    async def _check_slug(self, slug: str) -> None:
        if await self._templates.is_reserved(slug):
            raise InvalidArgumentError(
                f"cannot build {slug}: it is a template of the installation; choose another slug",
                field="slug",
            )

    def _shape(self, actor: Actor, defaults: Shape, wish: NewTemplate) -> Shape:
        try:
            shape = shape_of(defaults, vcpus=wish.vcpus, memory=wish.memory, disk=wish.disk)
            self._quota.check_shape(actor, shape)
        except InvalidArgumentError as error:
            field = str(error.facts.get("field", "")).replace("resources.", "defaults.")
            raise InvalidArgumentError(error.text, **{**error.facts, "field": field}) from error
        return shape

    def _build(
        self, actor: Actor, slug: str, status: BuildStatus, plan: Mapping[str, object]
    ) -> Build:
        return Build(
            id=new_uuid(),
            org_id=actor.org_id,
            slug=slug,
            number=0,
            owner_user_id=actor.user_id,
            status=status,
            created_at=self._clock.now(),
            plan=plan,
            by=_by(actor),
            at_once=plan_of(self._plans, actor).builds,
        )

    async def _new(self, actor: Actor, wish: NewTemplate) -> Build:
        await self._check_slug(wish.slug)
        check_steps(wish)
        if wish.network is not None:
            wish = replace(wish, network=await self._networks.checked(actor, wish.network))
        base, defaults = wish.base, _DEFAULTS
        if base is None:
            await self._templates.shipped.ready(BUILDER)
        else:
            try:
                chosen = await self._templates.choose(actor, base)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(error.text, field="base") from error
            base, defaults = chosen.name, chosen.defaults
        shape = self._shape(actor, defaults, wish)
        if wish.credentials is not None:
            await self._credentials.check(actor, wish.credentials, image=wish.image)
        uploads = [
            await self._uploads.find(actor, upload_id, field=name)
            for name, upload_id in dict.fromkeys(wish.uploads)
        ]
        if len({one.server_id for one in uploads}) > 1:
            raise InvalidArgumentError(
                "cannot build: its files were uploaded to several servers; upload them again, and "
                "have the load balancer keep a client at one server",
                field="steps",
            )
        plan = written(replace(wish, base=base)) | {"shape": asdict(shape)}
        build = self._build(actor, wish.slug, BuildStatus.QUEUED, plan)
        return replace(build, server_id=uploads[0].server_id if uploads else None)

    async def _check_limits(self, tx: Transaction, actor: Actor, *, is_new: bool) -> None:
        plan = plan_of(self._plans, actor)
        active = await tx.builds.count(actor.org_id, *ACTIVE_BUILDS)
        if active >= _QUEUED_MAX:
            raise LimitReachedError(
                f"cannot queue another build: {_QUEUED_MAX} of the organization are queued or in "
                "progress; wait for some to end, or cancel them",
                limit=_QUEUED_MAX,
            )
        kept = await tx.versions.kept(actor.org_id)
        count = len(await tx.templates.of(actor.org_id)) if is_new else 0
        for name, has, limit, hint in (
            # Builds beyond the limit wait; with a limit of 0 their turn would never come.
            ("builds", 0, plan.builds if plan.builds == 0 else None, "build on another plan"),
            ("templates", count, plan.templates if is_new else None, "delete one"),
            ("template_versions", kept.count + active, plan.template_versions, "delete some"),
            (
                "template_gb",
                kept.size_bytes / 2**30,
                plan.template_gb,
                "delete versions that are not needed",
            ),
        ):
            if limit is not None and has >= limit:
                raise LimitReachedError(
                    f"cannot build another version: the organization's plan allows {limit} "
                    f"{{limit}}; {hint}, or ask an operator for a higher limit",
                    limit=name,
                    allowed=limit,
                    used=int(has),
                )

    async def get(self, actor: Actor, slug: str, build_id: str) -> Build:
        """Return a build.

        Raises:
            NotFoundError: there is none of this template.
        """
        found = None
        if is_uuid(build_id):
            async with self._store.read() as tx:
                found = await tx.builds.find(actor.org_id, build_id)
        if found is None or found.slug != slug:
            raise NotFoundError(f"cannot find the build {build_id[:80]!r} of {slug[:80]!r}")
        return found

    async def place(self, build: Build) -> int | None:
        """Return the place of a build that has not begun in the organization's queue, from 1; None
        for others."""
        if build.status is not BuildStatus.QUEUED:
            return None
        async with self._store.read() as tx:
            return await tx.builds.place(build)

    async def look(
        self, actor: Actor, slug: str, build_id: str, *, after: int, limit: int, wait_s: float
    ) -> tuple[Build, list[BuildLine]]:
        """Return a build and the next lines of its log after a number. While it is in progress and
        has no more, wait for some for up to `wait_s`.

        Raises:
            NotFoundError: there is no such build.
        """
        until = self._clock.monotonic() + wait_s
        with self._bus.subscribe(topic_of(build_id)) as changes:
            while True:
                # Before the lines: one that has ended writes no more.
                build = await self.get(actor, slug, build_id)
                async with self._store.read() as tx:
                    lines = await tx.builds.read(build_id, after=after, limit=limit)
                left_s = until - self._clock.monotonic()
                if lines or build.status not in ACTIVE_BUILDS or left_s <= 0:
                    return build, lines
                await changes.wait(left_s)

    async def list(self, actor: Actor, slug: str) -> list[Build]:
        """Return the latest builds of a template, newest first.

        Raises:
            NotFoundError: there is no such template.
        """
        await self._templates.own(actor, slug)
        async with self._store.read() as tx:
            return await tx.builds.page(actor.org_id, slug, limit=LIST_MAX)

    async def cancel(self, actor: Actor, slug: str, build_id: str) -> Build:
        """Request that a build is cancelled; it ends soon.

        Raises:
            NotFoundError: see `get`.
            ConflictError: it has ended.
        """
        actor.require("template:write")
        build = await self.get(actor, slug, build_id)
        async with self._store.write(actor.org_id) as tx:
            if not await tx.builds.cancel(actor.org_id, build_id, at=self._clock.now()):
                raise ConflictError(
                    f"cannot cancel the build {build_id}: it has ended", status=build.status.value
                )
        self._bus.hint(topic_of(build_id))
        self._bus.hint(WORK)
        return await self.get(actor, slug, build_id)

    async def lines(
        self, actor: Actor, slug: str, build_id: str | None, *, after: int
    ) -> AsyncIterator[BuildLine | Build]:
        """Yield the log of a build, or of the last one for None, as it is written, and finally the
        build once it has ended.

        Raises:
            NotFoundError: there is no such build.
        """
        if build_id is None:
            builds = await self.list(actor, slug)
            if not builds:
                raise NotFoundError(f"cannot find a build of the template {slug[:80]!r}")
            build_id = builds[0].id
        with self._bus.subscribe(topic_of(build_id)) as changes:
            while True:
                # Before the lines: one that has ended writes no more.
                build = await self.get(actor, slug, build_id)
                async with self._store.read() as tx:
                    found = await tx.builds.read(build_id, after=after, limit=_PAGE)
                for one in found:
                    after = one.number
                    yield one
                if not found and build.ended_at is not None:
                    yield build
                    return
                if len(found) < _PAGE:
                    await changes.wait(_SLICE_S)


def _not_waiting(build: Build) -> ConflictError:
    return ConflictError(
        f"cannot start the build {build.id}: it was started before, or it has ended",
        status=build.status.value,
    )


def written(wish: NewTemplate) -> dict[str, object]:
    """Return a request as JSON values."""
    values = asdict(wish)
    values["files"] = [
        {"path": one.path, "mode": one.mode, "data": base64.b64encode(one.data).decode()}
        for one in wish.files
    ]
    values["network"] = None if wish.network is None else encode(wish.network)
    return values


def read(plan: Mapping[str, Any]) -> tuple[NewTemplate, Shape]:
    """Return the request that `written` wrote, and the default shape of what it builds."""
    values: dict[str, Any] = dict(plan)
    shape = Shape(**values.pop("shape"))
    files = tuple(
        NewFile(one["path"], base64.b64decode(one["data"]), one["mode"])
        for one in values.pop("files")
    )
    values |= {name: tuple(values[name]) for name in ("apt", "pip", "npm", "run")}
    values["tags"] = tuple(values.get("tags", ()))
    network = values.get("network")
    values["network"] = None if network is None else decode(Policy, network)
    values["steps"] = tuple(
        Step(StepKind(one["kind"]), tuple(one["args"]), one["phase"], one["upload"], one["force"])
        for one in values.get("steps", ())
    )
    # A server of the next version may have written more.
    known = {one.name for one in fields(NewTemplate)}
    return NewTemplate(
        **{name: one for name, one in values.items() if name in known}, files=files
    ), shape


def _by(actor: Actor) -> dict[str, object]:
    return {
        "role": actor.role,
        "kind": actor.kind,
        "key_id": actor.key_id,
        "key_generation": actor.key_generation,
        "is_test": actor.is_test,
        "plan": actor.plan,
        "limits": dict(actor.limits),
    }


def actor_of(build: Build) -> Actor:
    """Return the actor for the sandboxes of a build."""
    names = {one.name for one in fields(Actor)} - {"org_id", "user_id", "scopes"}
    by: Any = {name: value for name, value in build.by.items() if name in names}
    # Whether its network rules may name secrets was judged by who requested it.
    scopes = frozenset({"sandbox:create", "sandbox:read", "sandbox:write", "secret:use"})
    return Actor(org_id=build.org_id, user_id=build.owner_user_id, scopes=scopes, **by)
