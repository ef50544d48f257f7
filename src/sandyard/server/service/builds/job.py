"""One build, from its claim to its end.

A build with an image, an upload or a Dockerfile begins in a sandbox of the hidden template
`builder`, which unpacks it and packs it as a root file system that the node keeps: a stage. Steps
run in a sandbox of that stage, or of the base, which packs itself. At the end the node saves a
golden machine with the template's command running. The host opens nothing of what they read.
"""

import asyncio
import logging
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import Final

from sandyard.server.core.egress import Policy
from sandyard.server.core.errors import ConflictError, SandyardError
from sandyard.server.core.node_ops import PrepareVersion
from sandyard.server.core.records import Build, BuildStatus, TemplateVersion, VersionAbout
from sandyard.server.core.shapes import Shape
from sandyard.server.service.builds import recipes
from sandyard.server.service.builds.boxes import Box, Boxes, StaleCacheError
from sandyard.server.service.builds.builds import BUILDER, read
from sandyard.server.service.builds.cache import Hit
from sandyard.server.service.builds.config import ImageConfig, os_of
from sandyard.server.service.builds.copies import COPY
from sandyard.server.service.builds.keeping import Keeping
from sandyard.server.service.builds.plan import NewTemplate
from sandyard.server.service.builds.progress import BuildCancelled, LostLeaseError, Progress
from sandyard.server.service.builds.sources import (
    Begun,
    DockerfileSource,
    ImageSource,
    Made,
    Source,
    UploadSource,
)
from sandyard.server.service.builds.steps import Setting
from sandyard.server.service.builds.tasks import Task, last_setting, tasks_of
from sandyard.server.service.builds.tools import BuildTools
from sandyard.server.service.templates.templates import LATEST, Chosen
from sandyard.server.tasks import concurrently, to_the_end

log = logging.getLogger(__name__)

_WORTH_KEEPING_S: Final = 3.0
_OS_MAX: Final = 4096
_LINE_IN_ERROR_MAX: Final = 120
_LOGIN_MAX: Final = 256 * 1024


class Job:
    """A build that this server has claimed; it is run once."""

    def __init__(self, tools: BuildTools, build: Build, lease: str) -> None:
        self._tools = tools
        self._progress = Progress(tools.platform, build, lease, log_bytes=tools.limits.log_bytes)
        self._boxes = Boxes(tools, self._progress)

    async def run(self) -> None:
        """Carry the build out, whatever happens, up to its end in the store."""
        limit_s = self._tools.limits.limit_s
        status, error = BuildStatus.FAILED, None
        try:
            async with (
                self._progress.clock.timeout(limit_s),
                concurrently(self._progress.keep()) as keeping,
                concurrently(self._carry_out()) as working,
            ):
                await asyncio.wait([keeping, working], return_when=asyncio.FIRST_COMPLETED)
                (working if working.done() else keeping).result()
        except LostLeaseError:
            log.warning("the build %s is another server's by now", self._progress.build.id)
            return
        except BuildCancelled:
            status, error = BuildStatus.CANCELLED, "it was cancelled"
        except TimeoutError:
            error = f"it took longer than {limit_s:g} s"
        except SandyardError as failure:
            error = failure.message
        except asyncio.CancelledError:
            # The server ends: another, or this one after its start, begins it again.
            await to_the_end(self._progress.release())
            raise
        except Exception as failure:
            log.exception("a build failed unexpectedly")
            error = f"an internal error: {type(failure).__name__}"
        if self._progress.build.status is BuildStatus.READY:  # published, whatever came after that
            status, error = BuildStatus.READY, None
        await to_the_end(self._end(status, error))

    async def _carry_out(self) -> None:
        if not await self._begin():
            return
        wish = self._wish
        if wish.stands_for is not None:
            await self._progress.say(
                f"using the template {wish.base} for the image {wish.stands_for}"
            )
        try:
            made = await self._make()
        except StaleCacheError as error:
            await self._progress.say(f"building without the cache, which cannot be used: {error}")
            self._keeping.stop_reading()
            await self._clean_up()
            made = await self._make()
        await self._progress.phase("start")
        await self._progress.say("saving a machine that is ready to be cloned")
        node = self._tools.platform.nodes.get(made.node_id)
        await self._progress.patiently(lambda: node.do(PrepareVersion(made.fact.name)))
        await self._publish(made)

    async def _begin(self) -> bool:
        """Begin the build, or begin it again; return False if it is done."""
        progress, build = self._progress, self._progress.build
        if await self._tools.removal.published(build):  # its server ended after that
            progress.build = replace(build, status=BuildStatus.READY)
            return False
        if build.started_at is not None:  # before, it has left nothing
            await self._clean_up()
        if build.is_cancelled:
            raise BuildCancelled
        now = progress.clock.now()
        if build.started_at is None:
            await progress.save(status=BuildStatus.BUILDING, started_at=now)
        elif now - build.started_at > 2 * timedelta(seconds=self._tools.limits.limit_s):
            raise ConflictError("it was started several times and did not finish")
        else:
            await progress.say("the build starts again: its server ended")
        progress.mask(self._wish.secrets.values())
        return True

    @cached_property
    def _plan(self) -> tuple[NewTemplate, Shape]:
        return read(self._progress.build.plan)

    @property
    def _wish(self) -> NewTemplate:
        return self._plan[0]

    @cached_property
    def _keeping(self) -> Keeping:
        return Keeping(self._tools.cache, self._progress, *self._plan)

    async def _make(self) -> Made:
        """Build the root file system, and have a node keep it."""
        wish, shape = self._plan
        about = VersionAbout(
            wish.slug,
            "Linux",
            "headless",
            shape,
            build_id=self._progress.build.id,
            network=_before_use(wish.network),
        )
        if wish.base is not None:
            return await self._take_steps(*await self._from_base(wish.base, about))
        begun = await self._from_source(about)
        if not wish.has_steps:
            assert begun.made is not None
            return begun.made
        return await self._take_steps(begun, about)

    # --- the source -----------------------------------------------------------------------

    async def _from_base(self, base: str, about: VersionAbout) -> tuple[Begun, VersionAbout]:
        """Return what steps in a machine of a template begin with."""
        templates = self._tools.platform.templates
        known = await templates.about(self._progress.build.org_id, base)
        config = ImageConfig()
        if known is not None:
            config = ImageConfig(known.env, known.user, known.workdir, check=known.ready)
            if self._wish.network is None:
                about = replace(about, network=known.network)
        shipped = {one.slug: one for one in await templates.shipped.known()}.get(base)
        if (kin := known or shipped) is not None:
            about = replace(about, kind=kin.kind)
        origin = [base, shipped.digest if shipped else None]
        return Begun(config, {"base": base}, origin, base=base), about

    async def _from_source(self, about: VersionAbout) -> Begun:
        """Have the source kept as a version; or only look it up if a machine is kept that had it
        and steps after it."""
        wish = self._wish
        chosen = Chosen(BUILDER, self._tools.limits.builder)
        layers = None if wish.dockerfile is None else await self._keeping.find_layers()
        async with self._boxes.open(chosen, wish.network, kept=layers) as box:
            await box.shell(recipes.PREPARE)
            if (upload := wish.upload or wish.context) is not None:
                await self._progress.say("copying the upload")
                await box.write_upload(recipes.UPLOAD, upload)
            registry = await self._log_in(box)
            source = self._source()
            found = await source.find(box, registry)
            if found is not None and await self._find_step(found) is not None:
                return found
            begun = await source.unpack(box, registry)
            for one in begun.config.ignored:
                await self._progress.say(f"not used: {one}")
            made = await self._pack(box, begun, about)
            if wish.dockerfile is not None:
                await self._keeping.keep_layers(box)
        return replace(begun, base=made.fact.name, made=made)

    def _source(self) -> Source:
        wish = self._wish
        if wish.image is not None:
            return ImageSource(self._tools, self._progress, wish)
        if wish.dockerfile is not None:
            return DockerfileSource(self._tools, self._progress, wish, self._keeping)
        return UploadSource(self._tools, self._progress, wish)

    async def _log_in(self, box: Box) -> Mapping[str, str]:
        """Give a machine the credentials for the registry; return the variables that name them."""
        name = self._wish.credentials
        if name is None:
            return {}
        data = await self._tools.credentials.auth_file(self._progress.build.org_id, name)
        await box.write(recipes.AUTH_FILE, data, mode=0o600)
        return {"REGISTRY_AUTH_FILE": recipes.AUTH_FILE}

    # --- the steps ------------------------------------------------------------------------

    async def _find_step(self, begun: Begun) -> Hit | None:
        tasks = tasks_of(self._wish, begun.config, {})
        return await self._keeping.find_step(begun.origin, tasks)

    async def _take_steps(self, begun: Begun, about: VersionAbout) -> Made:
        """Run the steps in a sandbox, and have its root file system kept as a version."""
        wish = self._wish
        kept = await self._find_step(begun)
        if kept is None and begun.base is None:
            raise StaleCacheError("it was deleted")
        chosen = Chosen(begun.base or "", about.defaults)
        async with self._boxes.open(chosen, wish.network, kept=kept) as box:
            await self._progress.phase("steps")
            try:
                await box.shell(recipes.CHECK_TOOLS)
            except ConflictError as error:
                if kept is not None:
                    raise StaleCacheError("its tools are of an earlier version") from error
                slug = chosen.name.partition("@")[0]
                raise ConflictError(
                    f"the template {slug} was built by an earlier version of Sandyard; an operator "
                    f"runs `sandyard template build {slug}` on the host"
                ) from error
            await box.write_secrets(wish.secrets)
            login = await self._login_of(box)
            tasks = tasks_of(wish, begun.config, login)
            await self._take(box, tasks, begun.origin, done=0 if kept is None else kept.done)
            setting = last_setting(wish, begun.config, login)
            return await self._pack(box, begun, about, setting)

    async def _take(
        self, box: Box, tasks: Sequence[Task], origin: Sequence[object], *, done: int
    ) -> None:
        """Run all tasks but the first ones, which are `done`; keep the machine now and then."""
        names = self._keeping.names_of(origin, tasks)
        clock = self._progress.clock
        kept_at = clock.monotonic()
        for number, task in enumerate(tasks):
            if task.phase != self._progress.build.phase:
                await self._progress.phase(task.phase)
            if number < done:
                await self._progress.say(f"cached: {task.line}")
                continue
            await self._progress.say(task.line)
            try:
                await task.take(box)
            except ConflictError as error:
                line = textwrap.shorten(task.line, _LINE_IN_ERROR_MAX, placeholder="…")
                raise ConflictError(f"{line}: {error.text}") from error
            if clock.monotonic() - kept_at > _WORTH_KEEPING_S or task is tasks[-1]:
                await self._keeping.keep_step(box, names[number])
                kept_at = clock.monotonic()

    async def _login_of(self, box: Box) -> Mapping[str, str]:
        """Return the variables that the steps can refer to and that no step has set."""
        if not any("$" in arg for one in self._wish.steps for arg in one.args):
            return {}
        await box.shell(recipes.TELL_LOGIN)
        printed = await box.read(recipes.LOGIN_FILE, _LOGIN_MAX)
        pairs = (one.partition("=") for one in printed.decode(errors="replace").split("\0"))
        return {name: value for name, _, value in pairs if name}

    # --- the result -----------------------------------------------------------------------

    async def _pack(
        self, box: Box, begun: Begun, about: VersionAbout, setting: Setting | None = None
    ) -> Made:
        """Have the root file system that was unpacked kept as a version; with a `setting`, in which
        the steps have ended, that of the machine itself."""
        wish, config = self._wish, begun.config
        is_stage = setting is None and wish.has_steps
        if not is_stage:
            await self._progress.phase("pack")
        user, workdir = wish.default_user or config.user, wish.workdir or config.workdir
        env: Mapping[str, str] = {**config.env, **wish.env}
        if setting is not None and wish.steps:
            env, user, workdir = setting.env, setting.user, setting.workdir
        command: dict[str, object] | None = None
        if is_stage:
            pass  # the steps are to find a machine in which nothing runs yet
        elif wish.start is not None:
            command = {"shell": wish.start}
        elif config.command and not wish.is_bare:
            command = {"argv": list(config.command)}
        if command is not None:
            await box.write_command(command | {"env": env, "user": user, "workdir": workdir})
        recipe, keeps = (recipes.PACK_TREE, "") if setting is None else (recipes.PACK_SELF, "1")
        await box.shell(recipe, {"WORKDIR": workdir, "KEEPS": keeps})
        about = replace(
            about,
            os=os_of(await box.read(recipes.OS_FILE, _OS_MAX)),
            env=env,
            user=user,
            workdir=workdir,
            ready=wish.ready or (None if wish.is_bare else config.check),
        )
        await self._progress.say("keeping the root file system")
        fact = await box.keep_root(about)
        await self._progress.say(f"{fact.size_bytes / 2**20:.0f} MiB")
        await self._progress.save(stages=(*self._progress.build.stages, fact.name))
        return Made(fact, box.node_id, about, begun.source)

    async def _publish(self, made: Made) -> None:
        """Make the result a version, and the template's latest unless a later one is."""
        fact, build = made.fact, self._progress.build
        version = TemplateVersion(
            org_id=build.org_id,
            slug=build.slug,
            number=build.number,
            digest=fact.name.partition("@")[2],
            root=fact.root,
            size_bytes=fact.size_bytes,
            about=made.about,
            source=made.source,
            build_id=build.id,
            created_at=self._progress.clock.now(),
        )
        await self._progress.publish(version, {*self._wish.tags, LATEST})
        self._tools.platform.bus.hint(COPY)

    # --- the end --------------------------------------------------------------------------

    async def _clean_up(self) -> None:
        """Remove what an earlier attempt, or this one, has left."""
        build, removal = self._progress.build, self._tools.removal
        await self._boxes.delete_left()
        kept = () if build.status is not BuildStatus.READY else await removal.published(build)
        left = await removal.drop_stages(build, but=kept)
        if build.stages != left or build.sandbox_id:
            await self._progress.save(stages=left, sandbox_id=None)

    async def _end(self, status: BuildStatus, error: str | None) -> None:
        """Remove what is left, and write the end of the build, while the lease is kept."""
        async with concurrently(self._progress.beat()):
            with suppress(SandyardError, LostLeaseError):
                if error is not None:
                    await self._progress.say(f"the build ended: {error}")
                await self._progress.flush()
            try:
                await self._clean_up()
                await self._remove_uploads()
            except Exception:  # the end is written whatever cannot be removed
                log.exception("cannot remove all that a build left")
        await self._progress.end(status, error)

    async def _remove_uploads(self) -> None:
        wish = self._wish
        for upload in (wish.upload, wish.context):
            if upload is not None:
                await self._tools.uploads.remove(upload)


def _before_use(network: Policy | None) -> Policy | None:
    """Return what a version's machines may reach before they are a sandbox's. They have no
    credentials, so rules that end TLS cannot be enforced for them."""
    return None if network is None or network.ends_tls else network
