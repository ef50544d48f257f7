"""Carries builds out, in sandboxes of the organization that requested them.

A build with an image, an upload or a Dockerfile begins in a sandbox of the hidden template
`builder`, which unpacks it and packs it as a root file system that the node keeps: a stage. Steps
run in a sandbox of that stage, or of the base, which packs itself. At the end the node saves a
golden machine with the template's command running. The host opens nothing of what they read.

A build is leased. One whose server ended is begun again, and what it had is removed first.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, TypeVar

from sandyard.server.core import ops
from sandyard.server.core.contracts.node import NodeVersions, VersionFact, version_name
from sandyard.server.core.contracts.store import Transaction, Turn
from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import new_secret
from sandyard.server.core.records import (
    Build,
    BuildLine,
    BuildStatus,
    Sandbox,
    TemplateVersion,
    VersionAbout,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status
from sandyard.server.core.wire import printable
from sandyard.server.service.builds import recipes
from sandyard.server.service.builds.builds import (
    BUILDER,
    WORK,
    actor_of,
    read,
    topic_of,
)
from sandyard.server.service.builds.config import CONFIG_MAX, ImageConfig, os_of, read_config
from sandyard.server.service.builds.plan import NewTemplate
from sandyard.server.service.builds.uploads import Uploads
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.create import Creation, NewSandbox
from sandyard.server.service.sandboxes.files import Files
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.processes import Output, Processes
from sandyard.server.service.sandboxes.reach import Use
from sandyard.server.service.templates.templates import LATEST, REMOVED, Chosen, Templates
from sandyard.server.tasks import Crew, concurrently, to_the_end

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_LEASE: Final = timedelta(seconds=30)
_BEAT_S: Final = 2.0
_LOOK_S: Final = 2.0
_TIDY_S: Final = 60.0
_START_S: Final = 300.0
_FLUSH_S: Final = 0.5
_AGAIN_S: Final = 3.0
_PATIENCE_S: Final = 300.0
_ENDINGS: Final = 100
_GRACE: Final = timedelta(seconds=30)
_LINE_MAX: Final = 2000
_OS_MAX: Final = 4096
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")
_USE = Use("template.step", "", "run a step of a build in", is_in_feed=False)


@dataclass(frozen=True)
class BuildLimits:
    """The limits of builds: how many at once on this server, their duration, the size of their
    logs and of their root file systems, and the shape of the machine that unpacks."""

    at_once: int
    limit_s: float
    log_bytes: int
    size_max: int
    builder: Shape


class Building:
    """Carries builds out, and removes the bytes of versions that were deleted; it is to be run."""

    def __init__(
        self,
        platform: Platform,
        *,
        templates: Templates,
        uploads: Uploads,
        creation: Creation,
        sandboxes: Sandboxes,
        processes: Processes,
        files: Files,
        nodes: Mapping[str, NodeVersions],
        limits: BuildLimits,
    ) -> None:
        self._server_id = platform.server_id
        self.store = platform.store
        self.bus = platform.bus
        self.clock = platform.clock
        self.register = platform.register
        self._roster = platform.nodes
        self.templates = templates
        self.uploads = uploads
        self.creation = creation
        self.sandboxes = sandboxes
        self.processes = processes
        self.files = files
        self._nodes = nodes
        self.limits = limits
        self._at_work = 0

    def node_of(self, sandbox: Sandbox) -> NodeVersions:
        """Return the node of a sandbox.

        Raises:
            UnavailableError: it is not known here.
        """
        node = self._nodes.get(sandbox.node_id or "")
        if node is None:
            raise UnavailableError(f"cannot reach the node {sandbox.node_id}: it is not known here")
        return node

    def node(self, node_id: str) -> NodeVersions | None:
        """Return a node by its id."""
        return self._nodes.get(node_id)

    async def run(self) -> None:
        """Work forever."""
        async with Crew() as crew:
            crew.start(self._tidy(), "deleted templates are no longer removed")
            with self.bus.subscribe(WORK) as hints:
                while True:
                    try:
                        while self._at_work < self.limits.at_once and await self._begin(crew):
                            pass
                    except SandyardError as error:
                        log.warning("cannot look for builds: %s; retrying", error.message)
                    except Exception:  # one that cannot be read must not end the others
                        log.exception("cannot begin a build; retrying")
                    await hints.wait(_LOOK_S)

    async def _begin(self, crew: Crew) -> bool:
        lease = new_secret()
        async with self.store.write(Turn.SHARED) as tx:
            build = await tx.builds.claim(self._server_id, lease=lease, lasts=_LEASE)
        if build is None:
            return False
        self._at_work += 1
        work = crew.start(_Job(self, build, lease).run(), "a build could not be carried out")
        if work is None:
            self._at_work -= 1
            return False
        work.add_done_callback(lambda _: self._ended())
        return True

    def _ended(self) -> None:
        self._at_work -= 1
        self.bus.hint(WORK)

    # --- what was deleted -----------------------------------------------------------------

    async def _tidy(self) -> None:
        with self.bus.subscribe(REMOVED) as hints:
            while True:
                try:
                    await self.uploads.tidy()
                    await self._remove_bytes()
                except SandyardError as error:
                    log.warning("cannot remove deleted templates: %s; retrying", error.message)
                except Exception:  # the next look may succeed
                    log.exception("cannot remove deleted templates; retrying")
                await hints.wait(_TIDY_S)

    async def _remove_bytes(self) -> None:
        async with self.store.read() as tx:
            removed = await tx.versions.removed()
        since = self.clock.now() - _GRACE
        for version in removed:
            if version.removed_at is None or version.removed_at > since:
                continue  # a request that has chosen it may not have been written yet
            async with self.store.read() as tx:
                is_kept = await tx.versions.is_kept(version)
                if not is_kept and await tx.versions.is_used(version):
                    continue
            if is_kept or await self.drop(version_name(version.slug, version.digest)):
                async with self.store.write(version.org_id) as tx:
                    await tx.versions.forget(version)

    async def look_at(self, sandbox: Sandbox) -> None:
        """Learn what the node of a sandbox has now: placement believes older reports."""
        with suppress(UnavailableError):
            await self._roster.report_of(self._roster.get(sandbox.node_id))

    async def names_of(self, build: Build) -> tuple[str, ...]:
        """Return the names on nodes of what a build has published."""
        async with self.store.read() as tx:
            found = await tx.versions.of(build.org_id, build.slug)
        mine = (one for one in found if one.build_id == build.id)
        return tuple(version_name(one.slug, one.digest) for one in mine)

    async def drop_stages(self, build: Build, *, but: tuple[str, ...]) -> tuple[str, ...]:
        """Remove what nodes kept for a build, and return the names of what may be left."""
        left = False
        for node_id, node in list(self._nodes.items()):
            try:
                await node.drop_stages(build.id, but=but)
            except SandyardError as error:
                log.warning(
                    "cannot remove the stages of a build from the node %s: %s",
                    node_id,
                    error.message,
                )
                left = True
        return build.stages if left else ()

    async def drop(self, name: str) -> bool:
        """Remove a version from all nodes; return False if that must be repeated."""
        is_gone = True
        for node_id, node in list(self._nodes.items()):
            try:
                await node.drop_version(name)
            except SandyardError as error:
                log.debug("cannot remove %s from the node %s yet: %s", name, node_id, error.message)
                is_gone = False
        return is_gone


class _Cancelled(Exception):  # noqa: N818 - no error
    """The build was cancelled."""


class _Job:
    """One build, from its claim to its end."""

    def __init__(self, house: Building, build: Build, lease: str) -> None:
        self._house = house
        self._build = build
        self._lease = lease
        self._actor = actor_of(build)
        self._lines: list[BuildLine] = []
        self._log_left = house.limits.log_bytes
        self._flushing = asyncio.Lock()

    async def run(self) -> None:
        """Carry it out, whatever happens, up to its end in the store."""
        house = self._house
        status, error = BuildStatus.FAILED, None
        try:
            async with (
                house.clock.timeout(house.limits.limit_s),
                concurrently(self._keep()) as keeping,
                concurrently(self._carry_out()) as working,
            ):
                await asyncio.wait([keeping, working], return_when=asyncio.FIRST_COMPLETED)
                (working if working.done() else keeping).result()
        except _LostLeaseError:
            log.warning("the build %s is another server's by now", self._build.id)
            return
        except _Cancelled:
            status, error = BuildStatus.CANCELLED, "it was cancelled"
        except TimeoutError:
            error = f"it took longer than {house.limits.limit_s:g} s"
        except SandyardError as failure:
            error = failure.message
        except asyncio.CancelledError:
            # The server ends: another, or this one after its start, begins it again.
            await to_the_end(self._release())
            raise
        except Exception as failure:
            log.exception("a build failed unexpectedly")
            error = f"an internal error: {type(failure).__name__}"
        if self._build.status is BuildStatus.READY:  # it is published, whatever came after that
            status, error = BuildStatus.READY, None
        await to_the_end(self._end(status, error))

    async def _carry_out(self) -> None:
        house, build = self._house, self._build
        if await house.names_of(build):  # its server ended after it was published
            self._build = replace(build, status=BuildStatus.READY)
            return
        await self._clean_up()
        if build.is_cancelled:
            raise _Cancelled
        now = house.clock.now()
        if build.started_at is None:
            await self._save(status=BuildStatus.BUILDING, started_at=now)
        elif now - build.started_at > 2 * timedelta(seconds=house.limits.limit_s):
            raise ConflictError("it was started several times and did not finish")
        else:
            await self._say("the build starts again: its server ended")
        wish, shape = read(build.plan)
        config, base = ImageConfig(), wish.base
        source: Mapping[str, object] = {"base": base}
        about = VersionAbout(wish.slug, "Linux", "headless", shape, build_id=build.id)
        fact, node_id = None, ""
        if base is None:
            config, source = await self._stage(wish, about)
            fact, node_id, about = self._kept
            base = fact.name
        else:
            known = await house.templates.about(build.org_id, base)
            if known is not None:
                config = ImageConfig(known.env, known.user, known.workdir, check=known.ready)
        if wish.base is not None or wish.has_steps:
            await self._steps(wish, Chosen(base, shape), config, about)
            fact, node_id, about = self._kept
        assert fact is not None
        await self._phase("start")
        await self._say("saving a machine that is ready to be cloned")
        node, name = house.node(node_id), fact.name
        if node is None:
            raise UnavailableError(f"cannot reach the node {node_id}: it is not known here")
        await self._patiently(lambda: node.prepare_version(name))
        await self._publish(fact, about, source)

    # --- the source -----------------------------------------------------------------------

    async def _stage(
        self, wish: NewTemplate, about: VersionAbout
    ) -> tuple[ImageConfig, dict[str, object]]:
        """Unpack an image or build a Dockerfile, and keep the result as a version."""
        house = self._house
        chosen = Chosen(BUILDER, house.limits.builder)
        async with self._sandbox(chosen, chosen.defaults) as box:
            await self._shell(box, recipes.PREPARE)
            if (upload := wish.upload or wish.context) is not None:
                await self._say("copying the upload")
                await self._write(box, recipes.UPLOAD, house.uploads.read(upload))
            source: dict[str, object] = {}
            if wish.image is not None:
                await self._phase("pull")
                await self._shell(box, recipes.FETCH_IMAGE, {"IMAGE": _pinned(wish.image)})
                said = await self._read(box, f"{recipes.FOLDER}/digest", 200)
                digest = printable(said.decode(errors="replace").strip())
                source = {"image": wish.image, "digest": digest}
            elif wish.dockerfile is not None:
                await self._phase("build")
                text = wish.dockerfile.encode()
                await self._write(box, recipes.DOCKERFILE, _once(text))
                await self._shell(box, recipes.BUILD)
                source = {"dockerfile": True}
            else:
                await self._phase("unpack")
                await self._shell(box, recipes.FETCH_UPLOAD)
                source = {"upload": wish.upload}
            if wish.dockerfile is None:
                await self._phase("unpack")
                await self._shell(box, recipes.UNPACK)
            config = read_config(await self._read(box, recipes.CONFIG, CONFIG_MAX))
            for one in config.ignored:
                await self._say(f"not used: {one}")
            await self._pack(box, recipes.PACK_TREE, wish, config, about)
        return config, source

    # --- the steps ------------------------------------------------------------------------

    async def _steps(
        self, wish: NewTemplate, base: Chosen, config: ImageConfig, about: VersionAbout
    ) -> None:
        """Run the steps in a sandbox, and keep its root file system as a version."""
        async with self._sandbox(base, base.defaults) as box:
            await self._phase("steps")
            try:
                await self._shell(box, recipes.CHECK_TOOLS)
            except ConflictError as error:
                slug = base.name.partition("@")[0]
                raise ConflictError(
                    f"the template {slug} was built by an earlier version of Sandyard; an operator "
                    f"runs `sandyard template build {slug}` on the host"
                ) from error
            env = {**config.env, **wish.env}
            for one in wish.files:
                await self._say(f"writing {one.path}")
                write = ops.Write(one.path.encode(), parents=True, mode=one.mode)
                await self._house.files.write(self._actor, box.id, write, _once(one.data))
            for kind in ("apt", "pip", "npm"):
                if names := getattr(wish, kind):
                    await self._say(f"installing with {kind}: {' '.join(names)}")
                    await self._shell(box, recipes.install(kind, names), env)
            cwd = wish.workdir or config.workdir or "/"
            for command in wish.run:
                await self._say(f"running: {command}")
                await self._shell(box, command, env, cwd=cwd)
            await self._pack(box, recipes.PACK_SELF, wish, config, about)

    async def _pack(
        self,
        box: Sandbox,
        recipe: str,
        wish: NewTemplate,
        config: ImageConfig,
        about: VersionAbout,
    ) -> None:
        house = self._house
        await self._phase("pack")
        user = wish.default_user or config.user.partition(":")[0]
        workdir = wish.workdir or config.workdir
        env = {**config.env, **wish.env}
        command: dict[str, object] | None = None
        if wish.start is not None:
            command = {"shell": wish.start}
        elif config.command:
            command = {"argv": list(config.command)}
        if command is not None:
            command |= {"env": env, "user": user, "workdir": workdir}
            data = json.dumps(command).encode()
            await self._write(box, recipes.COMMAND_FILE, _once(data))
        keeps = "1" if recipe is recipes.PACK_SELF else ""
        await self._shell(box, recipe, {"WORKDIR": workdir, "KEEPS": keeps})
        release = await self._read(box, recipes.OS_FILE, _OS_MAX)
        about = replace(
            about,
            os=os_of(release),
            env=env,
            user=user,
            workdir=workdir,
            ready=wish.ready or config.check,
        )
        await self._say("keeping the root file system")
        fact = await house.node_of(box).keep_version(
            box.id,
            incarnation=box.incarnation,
            path=recipes.ROOT_FILE,
            about=about,
            size_max=house.limits.size_max,
        )
        await house.look_at(box)
        await self._say(f"{fact.size_bytes / 2**20:.0f} MiB")
        await self._save(stages=(*self._build.stages, fact.name))
        self._kept = (fact, box.node_id or "", about)

    _kept: tuple[VersionFact, str, VersionAbout]

    # --- sandboxes ------------------------------------------------------------------------

    @asynccontextmanager
    async def _sandbox(self, template: Chosen, shape: Shape) -> AsyncIterator[Sandbox]:
        """Create a sandbox for the build, which is deleted after the block."""
        house = self._house
        await self._phase("start a machine")
        sandbox = await self._created(
            NewSandbox(
                chosen=template,
                name=_name_of(self._build),
                idle_timeout=0,
                vcpus=shape.vcpus,
                memory=f"{shape.memory_mib}MB",
                disk=f"{shape.disk_mib}MB",
                ssh_keys=[],
                auto_resume=False,
                expires_in=int(house.limits.limit_s) + 600,
                metadata={"templateBuild": self._build.id},
                mounts=(),
            )
        )
        try:
            await self._save(sandbox_id=sandbox.id)
            if sandbox.status is not Status.RUNNING:
                reason = sandbox.reason.message if sandbox.reason else sandbox.status.value
                raise InternalError(f"the machine of the build did not start: {reason}")
            yield sandbox
        finally:
            await to_the_end(self._delete(sandbox.id))

    async def _created(self, wish: NewSandbox) -> Sandbox:
        create = self._house.creation.create
        return await self._patiently(lambda: create(self._actor, wish, wait_s=_START_S))

    async def _patiently(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do what may be impossible for a while, such as for lack of capacity."""
        clock, limit_s = self._house.clock, _PATIENCE_S
        until, told = clock.monotonic() + limit_s, ""
        while True:
            try:
                return await work()
            except UnavailableError as error:
                if clock.monotonic() > until:
                    raise
                if error.message != told:
                    told = error.message
                    await self._say(f"waiting: {told}")
                await clock.sleep(_AGAIN_S)

    async def _delete(self, reference: str, *, wait: bool = False) -> None:
        try:
            await self._house.sandboxes.delete(self._actor, reference, wait=wait)
        except NotFoundError:
            pass
        except SandyardError as error:  # it is deleted at its end
            log.warning("cannot delete the sandbox of a build yet: %s", error.message)

    async def _shell(
        self,
        box: Sandbox,
        command: str,
        env: Mapping[str, str] | None = None,
        *,
        cwd: str = "/",
    ) -> None:
        """Run a command as root, and put its output into the log.

        Raises:
            ConflictError: it failed, or the machine ended.
        """
        wish = ops.Run(command=command, cwd=cwd, env=dict(env or {}), user="root")
        text = _Lines()
        async with self._house.processes.run(self._actor, box.id, wish, _USE) as following:
            async for event in following.events():
                if isinstance(event, Output):
                    # What is cut off is not worth being taken apart.
                    for one in text.feed(event.data) if self._log_left > 0 else ():
                        await self._say(one)
                    continue
                for one in text.end():
                    await self._say(one)
                if event.exit_code != 0:
                    how = f"by {event.signal}" if event.signal else f"with {event.exit_code}"
                    raise ConflictError(f"a command ended {how}; the log shows what it said")
                return
        raise UnavailableError("the machine of the build ended during a command")

    async def _write(self, box: Sandbox, path: str, body: AsyncIterator[bytes]) -> None:
        write = ops.Write(path.encode(), parents=True)
        await self._house.files.write(self._actor, box.id, write, body)

    async def _read(self, box: Sandbox, path: str, most: int) -> bytes:
        found = bytearray()
        wish = ops.Read(path.encode())
        async with self._house.files.read(self._actor, box.id, wish) as reading:
            async for piece in reading.pieces(most + 1):
                found += piece
        if len(found) > most:
            raise InvalidArgumentError(f"cannot use the image: its {path} is over {most} bytes")
        return bytes(found)

    # --- the log --------------------------------------------------------------------------

    async def _phase(self, name: str) -> None:
        await self._save(phase=name)

    async def _say(self, text: str) -> None:
        """Add a line to the log; a large log is cut off."""
        if self._log_left <= 0:
            return
        shown = text[:_LINE_MAX]
        self._log_left -= len(shown) + 32
        if self._log_left <= 0:
            shown = "the log is cut off here: it is too long"
        number = self._build.lines + 1
        self._build = replace(self._build, lines=number)
        at = self._house.clock.now()
        self._lines.append(BuildLine(number, at, self._build.phase, shown))
        if len(self._lines) >= 200:
            await self._flush()

    async def _flush(self) -> None:
        async with self._flushing:
            lines = list(self._lines)
            if not lines:
                return
            async with self._house.store.write(Turn.SHARED) as tx:
                await tx.builds.append(self._build.id, lines)
                await self._saved(tx)
            del self._lines[: len(lines)]
        self._house.bus.hint(topic_of(self._build.id))

    # --- the row --------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Keep the lease, write the log, and raise when the build is cancelled.

        Raises:
            UnavailableError: the store has been away for almost as long as the lease lasts.
        """
        clock = self._house.clock
        written_at = clock.monotonic()
        while True:
            await clock.sleep(_FLUSH_S)
            now = clock.monotonic()
            try:
                await self._flush()
                if now - written_at >= _BEAT_S:
                    await self._save()
                    written_at = now
            except UnavailableError:
                if now - written_at > _LEASE.total_seconds() - _BEAT_S:
                    raise
            if self._build.is_cancelled:
                raise _Cancelled

    async def _save(self, **changes: object) -> None:
        self._build = replace(self._build, **changes)  # type: ignore[arg-type]
        async with self._house.store.write(Turn.SHARED) as tx:
            await self._saved(tx)

    async def _saved(self, tx: Transaction) -> None:
        saved = await tx.builds.save(self._build, lease=self._lease, lasts=_LEASE)
        if saved is None:
            raise _LostLeaseError
        if saved.is_cancelled:
            self._build = replace(self._build, is_cancelled=True)

    async def _publish(
        self, fact: VersionFact, about: VersionAbout, source: Mapping[str, object]
    ) -> None:
        """Make the result a version, and the template's latest unless a later one is."""
        now = self._house.clock.now()
        # With the version, so that nothing published is built once more.
        stages = tuple(one for one in self._build.stages if one != fact.name)
        build = replace(self._build, stages=stages, status=BuildStatus.READY, phase="")
        version = TemplateVersion(
            org_id=build.org_id,
            slug=build.slug,
            number=build.number,
            digest=fact.name.partition("@")[2],
            root=fact.root,
            size_bytes=fact.size_bytes,
            about=about,
            source=source,
            build_id=build.id,
            created_at=now,
        )
        async with self._house.store.write(build.org_id) as tx:
            template = await tx.templates.find(build.org_id, build.slug)
            if template is None or template.last_number < build.number:
                raise _Cancelled  # it was deleted meanwhile
            saved = await tx.builds.save(build, lease=self._lease, lasts=_LEASE)
            if saved is None:
                raise _LostLeaseError
            if saved.is_cancelled:
                raise _Cancelled
            await tx.versions.add(version)
            latest = max(build.number, template.tags.get(LATEST, 0))
            await tx.templates.put(
                replace(template, tags={**template.tags, LATEST: latest}, updated_at=now)
            )
        self._build = build

    async def _clean_up(self) -> None:
        """Remove what an earlier attempt left."""
        house, build = self._house, self._build
        await self._delete(_name_of(build), wait=True)
        kept = () if build.status is not BuildStatus.READY else await house.names_of(build)
        left = await house.drop_stages(build, but=kept)
        if build.stages != left or build.sandbox_id:
            await self._save(stages=left, sandbox_id=None)

    async def _end(self, status: BuildStatus, error: str | None) -> None:
        """Remove what is left, and write the end of the build, while the lease is kept."""
        async with concurrently(self._beat()):
            with suppress(SandyardError, _LostLeaseError):
                if error is not None:
                    await self._say(f"the build ended: {error}")
                await self._flush()
            try:
                await self._clean_up()
                await self._remove_uploads()
            except Exception:  # the end is written whatever cannot be removed
                log.exception("cannot remove all that a build left")
        self._build = replace(
            self._build, status=status, error=error, ended_at=self._house.clock.now(), phase=""
        )
        for _ in range(_ENDINGS):
            try:
                async with self._house.store.write(Turn.SHARED) as tx:
                    await tx.builds.save(self._build, lease=self._lease, lasts=None)
                break
            except UnavailableError as failure:
                log.warning("cannot write the end of a build yet: %s", failure.message)
                await self._house.clock.sleep(_AGAIN_S)
        self._house.bus.hint(topic_of(self._build.id))
        log.info("the build %s of %s ended: %s", self._build.id, self._build.slug, status.value)

    async def _beat(self) -> None:
        with suppress(_LostLeaseError):
            while True:
                with suppress(UnavailableError):
                    await self._save()
                await self._house.clock.sleep(_BEAT_S)

    async def _remove_uploads(self) -> None:
        wish, _ = read(self._build.plan)
        for upload in (wish.upload, wish.context):
            if upload is not None:
                await self._house.uploads.remove(upload)

    async def _release(self) -> None:
        with suppress(SandyardError, _LostLeaseError):
            await self._flush()
            async with self._house.store.write(Turn.SHARED) as tx:
                await tx.builds.save(self._build, lease=self._lease, lasts=None)


class _LostLeaseError(Exception):
    """Another server has the build."""


class _Lines:
    """Splits output into lines, without what would move a terminal's cursor."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are whole by now."""
        *whole, self._rest = re.split(rb"[\r\n]+", self._rest + data)
        if len(self._rest) > _LINE_MAX * 4:
            whole.append(self._rest)
            self._rest = b""
        return [_shown(one) for one in whole if one]

    def end(self) -> list[str]:
        """Return what is left."""
        left, self._rest = self._rest, b""
        return [_shown(left)] if left else []


def _shown(data: bytes) -> str:
    return printable(_ESCAPES.sub("", data.decode(errors="replace")))


def _name_of(build: Build) -> str:
    """Return the name of the sandbox of a build."""
    return f"build-{build.id}"


def _pinned(image: str) -> str:
    """Return a reference without its tag if it has a digest; skopeo does not take both."""
    name, at, digest = image.partition("@")
    if not at:
        return image
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}@{digest}"


async def _once(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
