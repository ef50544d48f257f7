"""Every template that an organization can use: the installation's, and its own with their versions
and tags."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import TemplateFact, TemplateStatus, version_name
from sandyard.server.core.contracts.store import Store, Transaction
from sandyard.server.core.errors import ConflictError, InvalidArgumentError, NotFoundError
from sandyard.server.core.records import (
    ACTIVE_BUILDS,
    Build,
    BuildStatus,
    Template,
    TemplateVersion,
    VersionAbout,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.service.actor import Actor
from sandyard.server.service.templates.shipped import ShippedTemplates

LATEST: Final = "latest"
REMOVED: Final = "templates:removed"
"""The topic of hints that bytes of versions may be removed from nodes."""
REFERENCE: Final = r"([a-z0-9-]{1,63})(?::([A-Za-z0-9_.-]{1,128})|@([0-9a-f]{6,64}))?"
"""What references to templates are like: `slug`, `slug:tag` or `slug@digest`."""
TAG: Final = r"(?![0-9]+$)[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
"""What tags are like: a number would mean a version."""
_REFERENCE = re.compile(REFERENCE)
_TAG = re.compile(TAG)
_KNOWN_MAX = 1000
_TAGS_MAX = 1000
_CANCELLED_MAX = 1000


@dataclass(frozen=True)
class Chosen:
    """A template as nodes know it, and the shape that it has by default."""

    name: str
    defaults: Shape


@dataclass(frozen=True)
class OwnTemplate:
    """An organization's template, its versions that are kept, newest first, and its last build."""

    template: Template
    versions: tuple[TemplateVersion, ...]
    last_build: Build | None

    @property
    def current(self) -> TemplateVersion | None:
        """The version with the tag `latest`."""
        return self.tagged(LATEST)

    def tagged(self, tag: str) -> TemplateVersion | None:
        """Return the version with a tag."""
        number = self.template.tags.get(tag)
        return next((one for one in self.versions if one.number == number), None)

    def tags_of(self, version: TemplateVersion) -> list[str]:
        """Return the tags of a version."""
        tags = self.template.tags
        return sorted(name for name, number in tags.items() if number == version.number)

    def fact(self) -> TemplateFact:
        """Return the template as it is listed."""
        version, build = self.current, self.last_build
        if version is not None:
            status = TemplateStatus.READY
        elif build is not None and build.status in ACTIVE_BUILDS:
            status = TemplateStatus.BUILDING
        elif build is not None and build.status is BuildStatus.WAITING:
            status = TemplateStatus.PENDING
        else:
            status = TemplateStatus.FAILED
        is_failure = build is not None and build.status is BuildStatus.FAILED
        return TemplateFact(
            slug=self.template.slug,
            name=self.template.name,
            description=self.template.description,
            kind=version.about.kind if version else "headless",
            status=status,
            defaults=version.about.defaults if version else Shape(1, 512, 1024),
            os=version.about.os if version else None,
            digest=version.digest if version else None,
            size_bytes=version.size_bytes if version else None,
            created_at=version.created_at if version else None,
            error=build.error if build is not None and is_failure else None,
        )


class Templates:
    """Looks templates up, and changes those of organizations."""

    def __init__(self, store: Store, shipped: ShippedTemplates, bus: Bus, clock: Clock) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock
        self.shipped = shipped
        self._known: dict[tuple[str, str], VersionAbout] = {}

    # --- for those who use them -----------------------------------------------------------

    async def all(self, actor: Actor) -> list[TemplateFact]:
        """Return every template that the actor can use, the installation's first.

        Raises:
            UnavailableError: no template of the installation is known, and not every node answers.
        """
        shipped = [one for one in await self.shipped.all() if not one.is_hidden]
        async with self._store.read() as tx:
            own = [await self._own(tx, one) for one in await tx.templates.of(actor.org_id)]
        return [*shipped, *(one.fact() for one in own)]

    async def get(self, actor: Actor, slug: str) -> TemplateFact:
        """Return a template.

        Raises:
            NotFoundError: the actor can use none with this slug.
        """
        for fact in await self.shipped.all():
            if fact.slug == slug and not fact.is_hidden:
                return fact
        return (await self.own(actor, slug)).fact()

    async def choose(self, actor: Actor, reference: str) -> Chosen:
        """Return the template that a reference means: `slug`, `slug:tag`, `slug:number` or
        `slug@digest`.

        Raises:
            InvalidArgumentError: there is none; `facts` name the field.
            ConflictError: it is not built.
            UnavailableError: it is being built, or not every node answers.
        """
        slug, tag, digest = _parsed(reference)
        shipped = {one.slug: one for one in await self.shipped.known()}
        if slug in shipped and not shipped[slug].is_hidden and not digest and tag in ("", LATEST):
            fact = await self.shipped.ready(slug)
            return Chosen(slug, fact.defaults)
        own = None if slug in shipped else await self._find(actor, slug)
        if own is None:
            if slug not in shipped:
                # Nodes that do not answer may know it.
                await self.shipped.ready(slug, others=await self._slugs(actor))
            raise _unknown(reference, "use its slug alone")
        version = _version_of(own, tag, digest)
        if version is None and not own.versions:
            raise ConflictError(
                f"cannot start from the template {slug}: no build of it has succeeded yet; "
                f"`sandyard template logs {slug}` shows the last one",
                field="template",
                reason="template_not_built",
            )
        if version is None:
            tags = ", ".join(sorted(own.template.tags)) or "none"
            raise _unknown(reference, f"its tags are {tags}")
        return Chosen(version_name(slug, version.digest), version.about.defaults)

    async def about(self, org_id: str, name: str) -> VersionAbout | None:
        """Return what belongs to the template or version that nodes know by a name; None if that
        is nothing, or was forgotten."""
        slug, _, digest = name.partition("@")
        if not digest:
            fact = await self.shipped.last(slug)
            return None if fact is None else _about_of(fact)
        known = self._known.get((org_id, name))
        if known is None:
            async with self._store.read() as tx:
                found = await tx.versions.about(org_id, slug, digest)
            if found is None:
                return None
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            known = self._known[org_id, name] = found
        return known

    async def has_desktop(self, org_id: str, name: str) -> bool:
        """Tell whether what nodes know by a name is an organization's version with a desktop."""
        about = await self.about(org_id, name) if "@" in name else None
        return about is not None and about.kind == "desktop"

    # --- an organization's own ------------------------------------------------------------

    async def own(self, actor: Actor, slug: str) -> OwnTemplate:
        """Return a template of the actor's organization.

        Raises:
            NotFoundError: there is none.
        """
        found = await self._find(actor, slug)
        if found is None:
            raise _absent(slug)
        return found

    async def tag(self, actor: Actor, slug: str, tag: str, number: int) -> OwnTemplate:
        """Give a version a tag, which another one loses.

        Raises:
            InvalidArgumentError: the tag is invalid, or there is no such version.
            NotFoundError: there is no such template.
        """
        actor.require("template:write")
        check_tag(tag)
        async with self._store.write(actor.org_id) as tx:
            template = await self._template(tx, actor, slug)
            versions = await tx.versions.of(actor.org_id, slug)
            if all(one.number != number for one in versions):
                raise InvalidArgumentError(
                    f"cannot tag the version {number} of {slug}: there is none", field="version"
                )
            check_count(template, [tag])
            await self._put(tx, replace(template, tags={**template.tags, tag: number}))
        return await self.own(actor, slug)

    async def untag(self, actor: Actor, slug: str, tag: str) -> None:
        """Remove a tag; the version stays.

        Raises:
            NotFoundError: there is no such template or tag.
        """
        actor.require("template:write")
        async with self._store.write(actor.org_id) as tx:
            template = await self._template(tx, actor, slug)
            if tag not in template.tags:
                raise NotFoundError(f"cannot find the tag {tag[:80]!r} of the template {slug}")
            left = {name: number for name, number in template.tags.items() if name != tag}
            await self._put(tx, replace(template, tags=left))

    async def remove(self, actor: Actor, slug: str) -> None:
        """Delete a template with all its versions. Sandboxes and snapshots keep what they need.

        Raises:
            NotFoundError: there is no such template.
        """
        actor.require("template:write")
        async with self._store.write(actor.org_id) as tx:
            await self._template(tx, actor, slug)
            for build in await tx.builds.page(actor.org_id, slug, limit=_CANCELLED_MAX):
                await tx.builds.cancel(actor.org_id, build.id, at=self._clock.now())
            await tx.templates.remove(actor.org_id, slug, at=self._clock.now())
        self._bus.hint(REMOVED)

    async def remove_version(self, actor: Actor, slug: str, number: int) -> None:
        """Delete a version and its tags. If it was the latest, the newest of the others is.

        Raises:
            NotFoundError: there is no such version.
        """
        actor.require("template:write")
        async with self._store.write(actor.org_id) as tx:
            template = await self._template(tx, actor, slug)
            versions = await tx.versions.of(actor.org_id, slug)
            version = next((one for one in versions if one.number == number), None)
            if version is None:
                raise NotFoundError(f"cannot find the version {number} of the template {slug}")
            await tx.versions.remove(version, at=self._clock.now())
            tags = {name: one for name, one in template.tags.items() if one != number}
            left = [one.number for one in versions if one is not version]
            if LATEST in template.tags and LATEST not in tags and left:
                tags[LATEST] = left[0]
            await self._put(tx, replace(template, tags=tags))
        self._bus.hint(REMOVED)

    async def is_reserved(self, slug: str) -> bool:
        """Tell whether a slug is one of the installation's templates."""
        return any(one.slug == slug for one in await self.shipped.known())

    async def _put(self, tx: Transaction, template: Template) -> None:
        await tx.templates.put(replace(template, updated_at=self._clock.now()))

    async def _template(self, tx: Transaction, actor: Actor, slug: str) -> Template:
        template = await tx.templates.find(actor.org_id, slug)
        if template is None:
            raise _absent(slug)
        return template

    async def _find(self, actor: Actor, slug: str) -> OwnTemplate | None:
        async with self._store.read() as tx:
            template = await tx.templates.find(actor.org_id, slug)
            return None if template is None else await self._own(tx, template)

    async def _slugs(self, actor: Actor) -> Iterable[str]:
        async with self._store.read() as tx:
            return [one.slug for one in await tx.templates.of(actor.org_id)]

    async def _own(self, tx: Transaction, template: Template) -> OwnTemplate:
        versions = await tx.versions.of(template.org_id, template.slug)
        builds = await tx.builds.page(template.org_id, template.slug, limit=1)
        return OwnTemplate(template, tuple(versions), builds[0] if builds else None)


def _about_of(fact: TemplateFact) -> VersionAbout | None:
    """Return the defaults of a template of the installation, if it has any."""
    if not (fact.user or fact.workdir):
        return None
    return VersionAbout(
        slug=fact.slug,
        os=fact.os or "",
        kind=fact.kind,
        defaults=fact.defaults,
        user=fact.user,
        workdir=fact.workdir,
    )


def _parsed(reference: str) -> tuple[str, str, str]:
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise _unknown(reference, "write it as slug, slug:tag or slug@digest")
    return found[1], found[2] or "", found[3] or ""


def _version_of(own: OwnTemplate, tag: str, digest: str) -> TemplateVersion | None:
    if digest:
        return next((one for one in own.versions if one.digest.startswith(digest)), None)
    number = own.template.tags.get(tag or LATEST)
    if number is None and tag.isdigit():
        number = int(tag)
    return next((one for one in own.versions if one.number == number), None)


def check_tag(tag: str) -> None:
    """Refuse what cannot be a tag.

    Raises:
        InvalidArgumentError: it is no valid tag.
    """
    if not _TAG.fullmatch(tag):
        raise InvalidArgumentError(
            "cannot use this tag: it has at most 128 letters, digits, _, . and -, begins with a "
            "letter, a digit or _, and is not a number, which would mean a version",
            field="tag",
        )


def check_count(template: Template, tags: Iterable[str]) -> None:
    """Refuse more tags than a template can have.

    Raises:
        InvalidArgumentError: there would be too many.
    """
    new = {*tags} - {*template.tags}
    if new and len(template.tags) + len(new) > _TAGS_MAX:
        raise InvalidArgumentError(f"cannot use over {_TAGS_MAX} tags: remove some", field="tag")


def _absent(slug: str) -> NotFoundError:
    return NotFoundError(f"cannot find the template {slug[:80]!r}")


def _unknown(reference: str, hint: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"cannot use the template {reference[:120]!r}: {hint}",
        field="template",
        reason="no_template",
    )
