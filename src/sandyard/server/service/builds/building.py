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
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from itertools import takewhile
from typing import Final, TypeVar

from sandyard.server.core import ops
from sandyard.server.core.contracts.node import (
    NodeControl,
    NodeOperation,
    VersionFact,
    version_name,
)
from sandyard.server.core.contracts.store import Transaction, Turn
from sandyard.server.core.egress import NO_RULES, Policy
from sandyard.server.core.errors import (
    AlreadyExistsError,
    ConflictError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import new_secret
from sandyard.server.core.node_ops import DropStages, DropVersion, KeepVersion, PrepareVersion
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
    LIST_MAX,
    WAITS,
    WORK,
    actor_of,
    read,
    topic_of,
)
from sandyard.server.service.builds.cache import BuildCache, Hit, digest_of, step_names
from sandyard.server.service.builds.config import CONFIG_MAX, ImageConfig, os_of, read_config
from sandyard.server.service.builds.copies import COPY, Copies
from sandyard.server.service.builds.credentials import RegistryCredentials
from sandyard.server.service.builds.output import LINE_MAX, Lines, Masks
from sandyard.server.service.builds.plan import NewTemplate
from sandyard.server.service.builds.steps import Setting, Work, work_of
from sandyard.server.service.builds.uploads import KEPT, Uploads
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.create import Creation, NewSandbox
from sandyard.server.service.sandboxes.files import Files
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.processes import Following, Output, Processes, Which
from sandyard.server.service.sandboxes.reach import Use
from sandyard.server.service.templates.templates import LATEST, REMOVED, Chosen, Templates
from sandyard.server.tasks import Crew, concurrently, to_the_end

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_LEASE: Final = timedelta(seconds=30)
_BEAT_S: Final = 2.0
_LOOK_S: Final = 2.0
_TIDY_S: Final = 60.0
_NODES_AT_ONCE: Final = 32
_LOGS_KEPT: Final = 20
"""Logs of ended builds that are kept of each template."""
_START_S: Final = 300.0
_FLUSH_S: Final = 0.5
_LINES_AT_ONCE: Final = 1000
_AGENT_BACK_S: Final = 30.0
_AGAIN_S: Final = 3.0
_LOOK_AGAIN_S: Final = 0.2
_GOING_S: Final = 120.0
_WORTH_KEEPING_S: Final = 3.0
_PATIENCE_S: Final = 300.0
_ENDINGS: Final = 100
_GRACE: Final = timedelta(seconds=30)
_OS_MAX: Final = 4096
_TOLD_MAX: Final = 120
_LOGIN_MAX: Final = 256 * 1024
_FLOOD: Final = 32  # times the size of a log
_USE = Use("template.step", "", "run a step of a build in", is_in_feed=False)


@dataclass(frozen=True)
class BuildLimits:
    """The limits of builds: how many at once on this server, their duration, the size of their
    logs, of their root file systems and of what they keep for later ones, and the shape of the
    machine that unpacks."""

    at_once: int
    limit_s: float
    log_bytes: int
    size_max: int
    cache_bytes: int
    builder: Shape


class Building:
    """Carries builds out, and removes the bytes of versions that were deleted; it is to be run."""

    def __init__(
        self,
        platform: Platform,
        *,
        templates: Templates,
        uploads: Uploads,
        credentials: RegistryCredentials,
        cache: BuildCache,
        creation: Creation,
        sandboxes: Sandboxes,
        processes: Processes,
        files: Files,
        limits: BuildLimits,
    ) -> None:
        self._server_id = platform.server_id
        self.store = platform.store
        self.bus = platform.bus
        self.clock = platform.clock
        self.register = platform.register
        self.nodes = platform.nodes
        self.templates = templates
        self.uploads = uploads
        self.credentials = credentials
        self.cache = cache
        self.creation = creation
        self.sandboxes = sandboxes
        self.processes = processes
        self.files = files
        self.limits = limits
        self._copies = Copies(platform)
        self._at_work = 0

    async def run(self) -> None:
        """Work forever."""
        async with Crew() as crew:
            crew.start(self._tidy(), "deleted templates are no longer removed")
            crew.start(self._copies.run(), "templates are no longer copied between nodes")
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
                    await self._give_up()
                    await self._remove_bytes()
                except SandyardError as error:
                    log.warning("cannot remove deleted templates: %s; retrying", error.message)
                except Exception:  # the next look may succeed
                    log.exception("cannot remove deleted templates; retrying")
                await hints.wait(_TIDY_S)

    async def _give_up(self) -> None:
        """End builds whose upload is on a server that has not come back: it is gone by now."""
        now = self.clock.now()
        async with self.store.write(Turn.SHARED) as tx:
            given_up = await tx.builds.give_up(
                before=now - KEPT,
                at=now,
                error="the server that has its upload did not return within a day; build it again",
            )
            await tx.builds.expire(
                before=now - WAITS,
                at=now,
                error="it was announced, and not started within two hours",
            )
        for build in given_up:
            await self.drop_stages(build, but=await self.names_of(build))

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
            await self.nodes.report_of(self.nodes.get(sandbox.node_id))

    async def names_of(self, build: Build) -> tuple[str, ...]:
        """Return the names on nodes of what a build has published."""
        async with self.store.read() as tx:
            found = await tx.versions.of(build.org_id, build.slug)
        mine = (one for one in found if one.build_id == build.id)
        return tuple(version_name(one.slug, one.digest) for one in mine)

    async def drop_stages(self, build: Build, *, but: tuple[str, ...]) -> tuple[str, ...]:
        """Remove what nodes kept for a build, and return the names of what may be left."""
        is_done = await self._on_all_nodes(
            DropStages(build.id, but=but), f"the stages of the build {build.id}"
        )
        return () if is_done else build.stages

    async def drop(self, name: str) -> bool:
        """Remove a version from all nodes; return False if that must be repeated."""
        return await self._on_all_nodes(DropVersion(name), name)

    async def _on_all_nodes(self, operation: NodeOperation[None], what: str) -> bool:
        """Ask all nodes concurrently to remove something; return False if one is away or failed."""
        turns = asyncio.Semaphore(_NODES_AT_ONCE)

        async def ask_one(node: NodeControl) -> bool:
            if not self.nodes.is_there(node.node_id):
                return False
            async with turns:
                try:
                    await node.do(operation)
                except SandyardError as error:
                    log.warning(
                        "cannot remove %s from the node %s: %s", what, node.node_id, error.message
                    )
                    return False
            return True

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask_one(one)) for one in self.nodes.all()]
        return all(one.result() for one in asked)


@dataclass(frozen=True)
class _Task:
    """One of the things that a build does in a machine: what the log says, all that its result
    depends on, the work, and what the log calls it."""

    told: str
    key: object
    take: Callable[[Sandbox], Awaitable[None]]
    phase: str = "steps"
    is_forced: bool = False


@dataclass(frozen=True)
class _Made:
    """A version that a node keeps, and its source."""

    fact: VersionFact
    node_id: str
    about: VersionAbout
    source: Mapping[str, object]


@dataclass(frozen=True)
class _Begun:
    """What steps begin with: the settings, the source, and what identifies the root file system.
    `base` is the template to start a machine of, and `made` is that as a version; both are None if
    only a machine that was kept has it."""

    config: ImageConfig
    source: Mapping[str, object]
    origin: Sequence[object]
    base: str | None = None
    made: _Made | None = None


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
        self._masks = Masks()
        self._keeps_cache = self._reads_cache = False

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
        if build.started_at is not None:  # before, it has left nothing
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
        self._network = wish.network or NO_RULES
        self._masks = Masks(wish.secrets.values())
        self._tags = {*wish.tags, LATEST}
        self._keeps_cache = wish.is_cached and house.cache.is_on
        self._reads_cache = self._keeps_cache and not wish.force
        about = VersionAbout(
            wish.slug,
            "Linux",
            "headless",
            shape,
            build_id=build.id,
            network=_before_use(wish.network),
        )
        if wish.stands_for is not None:
            await self._say(f"using the template {wish.base} for the image {wish.stands_for}")
        try:
            made = await self._make(wish, about)
        except _StaleCacheError as error:
            await self._say(f"building without the cache, which cannot be used: {error}")
            self._reads_cache = False
            await self._clean_up()
            made = await self._make(wish, about)
        await self._phase("start")
        await self._say("saving a machine that is ready to be cloned")
        node = house.nodes.get(made.node_id)
        await self._patiently(lambda: node.do(PrepareVersion(made.fact.name)))
        await self._publish(made)

    async def _make(self, wish: NewTemplate, about: VersionAbout) -> "_Made":
        """Build the root file system, and have a node keep it."""
        house, org_id = self._house, self._build.org_id
        if wish.base is None:
            begun = await self._stage(wish, about)
        else:
            known = await house.templates.about(org_id, wish.base)
            config = ImageConfig()
            if known is not None:
                config = ImageConfig(known.env, known.user, known.workdir, check=known.ready)
                if wish.network is None:
                    about = replace(about, network=known.network)
            shipped = {one.slug: one for one in await house.templates.shipped.known()}
            base = shipped.get(wish.base)
            if (kin := known or base) is not None:
                about = replace(about, kind=kin.kind)
            origin = [wish.base, base.digest if base else None]
            begun = _Begun(config, {"base": wish.base}, origin, base=wish.base)
        if wish.base is None and not wish.has_steps:
            assert begun.made is not None
            return begun.made
        return await self._take_steps(wish, begun, about)

    # --- the source -----------------------------------------------------------------------

    async def _stage(self, wish: NewTemplate, about: VersionAbout) -> "_Begun":
        """Unpack an image or build a Dockerfile, and have the result kept as a version; or only
        look the image up if a machine is kept that had it and steps after it."""
        house = self._house
        chosen = Chosen(BUILDER, house.limits.builder)
        layers = None
        if wish.dockerfile is not None and self._reads_cache:
            layers = await house.cache.find_layers(self._actor, wish.slug)
        async with self._sandbox(chosen, chosen.defaults, kept=layers) as box:
            await self._shell(box, recipes.PREPARE)
            if (upload := wish.upload or wish.context) is not None:
                await self._say("copying the upload")
                await self._write(box, recipes.UPLOAD, house.uploads.read(upload))
            registry: dict[str, str] = {}
            if wish.credentials is not None:
                data = await house.credentials.auth_file(self._build.org_id, wish.credentials)
                await self._write(box, recipes.AUTH_FILE, _once(data), mode=0o600)
                registry = {"REGISTRY_AUTH_FILE": recipes.AUTH_FILE}
            source: dict[str, object] = {}
            origin: list[object] = []
            if wish.image is not None:
                await self._phase("pull")
                env = registry | {"IMAGE": _pinned(wish.image)}
                await self._shell(box, recipes.FIND_IMAGE, env)
                config = await self._config_in(box)
                said = await self._read(box, f"{recipes.FOLDER}/digest", 200)
                digest = printable(said.decode(errors="replace").strip())
                source = {"image": wish.image, "digest": digest}
                origin = ["image", digest]
                begun = _Begun(config, source, origin)
                if await self._step_kept(wish, begun) is not None:
                    return begun
                await self._shell(box, recipes.PULL_IMAGE, registry)
            elif wish.dockerfile is not None:
                await self._build_dockerfile(box, wish, registry)
                source = {"dockerfile": True}
                built = await self._read(box, f"{recipes.FOLDER}/image-id", 200)
                origin = ["dockerfile", built.decode(errors="replace")]
            else:
                await self._phase("unpack")
                await self._shell(box, recipes.FETCH_UPLOAD)
                await self._config_in(box)  # refused before all of it is unpacked
                source = {"upload": wish.upload}
                known = await house.uploads.find(self._actor, str(wish.upload), field="upload")
                origin = ["upload", known.digest]
            if wish.dockerfile is None:
                await self._phase("unpack")
                await self._shell(box, recipes.UNPACK)
            config = await self._config_in(box)
            for one in config.ignored:
                await self._say(f"not used: {one}")
            begun = _Begun(config, source, origin)
            made = await self._pack(box, wish, begun, about)
            if wish.dockerfile is not None:
                await self._keep_layers(box)
        return replace(begun, base=made.fact.name, made=made)

    async def _build_dockerfile(
        self, box: Sandbox, wish: NewTemplate, registry: Mapping[str, str]
    ) -> None:
        await self._phase("build")
        assert wish.dockerfile is not None
        await self._write(box, recipes.DOCKERFILE, _once(wish.dockerfile.encode()))
        await self._write_secrets(box, wish)
        try:
            await self._shell(box, recipes.BUILD, {**registry, "FORCE": "1" if wish.force else ""})
        except ConflictError:  # of an instruction; those before it need not be repeated
            await self._keep_layers(box)
            raise

    async def _config_in(self, box: Sandbox) -> ImageConfig:
        return read_config(await self._read(box, recipes.CONFIG, CONFIG_MAX))

    # --- the steps ------------------------------------------------------------------------

    def _tasks_of(
        self, wish: NewTemplate, config: ImageConfig, login: Mapping[str, str]
    ) -> "list[_Task]":
        """Return what is to be done, in order. What `login` has changes no key."""
        env = {**config.env, **wish.env}
        tasks: list[_Task] = []
        if wish.files:

            async def write_files(box: Sandbox) -> None:
                for one in wish.files:
                    await self._write(box, one.path, _once(one.data), mode=one.mode)

            told = f"writing {', '.join(one.path for one in wish.files)}"
            digests = [[one.path, one.mode, sha256(one.data).hexdigest()] for one in wish.files]
            tasks.append(_Task(told, ["files", digests], write_files))
        for kind in ("apt", "pip", "npm"):
            if names := getattr(wish, kind):
                told = f"installing with {kind}: {' '.join(names)}"
                run = partial(self._shell, command=recipes.install(kind, names), env=env)
                tasks.append(_Task(told, [kind, names, env], run))
        cwd = wish.workdir or config.workdir or "/"
        for command in wish.run:
            run = partial(self._shell, command=command, env=env, cwd=cwd)
            tasks.append(_Task(f"running: {command}", ["run", command, env, cwd], run))
        setting = _setting(wish, config, login)
        seen: object = [dict(setting.env), setting.user, setting.workdir]
        for step in wish.steps:
            seen = digest_of([seen, step.kind, step.args, step.upload])
            if (work := work_of(step, setting)) is not None:
                take = partial(self._do, work=work)
                tasks.append(_Task(work.told, ["step", seen], take, step.phase, step.force))
            setting = setting.after(step)
        return tasks

    async def _do(self, box: Sandbox, *, work: Work) -> None:
        if work.upload is not None:
            await self._write(box, recipes.ARCHIVE, self._house.uploads.read(work.upload))
        await self._shell(box, work.command, work.env, cwd=work.cwd, user=work.user)

    async def _login_of(self, box: Sandbox, wish: NewTemplate) -> Mapping[str, str]:
        """Return the variables that the steps can refer to and that no step has set."""
        if not any("$" in arg for one in wish.steps for arg in one.args):
            return {}
        await self._shell(box, recipes.TELL_LOGIN)
        told = await self._read(box, recipes.LOGIN_FILE, _LOGIN_MAX)
        pairs = (one.partition("=") for one in told.decode(errors="replace").split("\0"))
        return {name: value for name, _, value in pairs if name}

    def _names_of(self, tasks: "Sequence[_Task]", begun: "_Begun") -> list[str]:
        """Return the names of the machines after each task, if they are kept."""
        _, shape = read(self._build.plan)
        origin = [*begun.origin, asdict(shape)]
        return step_names(self._actor, origin, [one.key for one in tasks])

    async def _step_kept(self, wish: NewTemplate, begun: "_Begun") -> Hit | None:
        """Return the machine of an earlier build that has the most of the tasks done."""
        if not self._reads_cache:
            return None
        tasks = self._tasks_of(wish, begun.config, {})
        reusable = [*takewhile(lambda one: not one.is_forced, tasks)]
        return await self._house.cache.find_step(self._actor, self._names_of(reusable, begun))

    async def _take_steps(self, wish: NewTemplate, begun: "_Begun", about: VersionAbout) -> "_Made":
        """Run the steps in a sandbox, and have its root file system kept as a version."""
        kept = await self._step_kept(wish, begun)
        if kept is None and begun.base is None:
            raise _StaleCacheError("it was deleted")
        chosen = Chosen(begun.base or "", about.defaults)
        async with self._sandbox(chosen, about.defaults, kept=kept) as box:
            await self._phase("steps")
            try:
                await self._shell(box, recipes.CHECK_TOOLS)
            except ConflictError as error:
                if kept is not None:
                    raise _StaleCacheError("its tools are of an earlier version") from error
                slug = chosen.name.partition("@")[0]
                raise ConflictError(
                    f"the template {slug} was built by an earlier version of Sandyard; an operator "
                    f"runs `sandyard template build {slug}` on the host"
                ) from error
            await self._write_secrets(box, wish)
            login = await self._login_of(box, wish)
            tasks = self._tasks_of(wish, begun.config, login)
            names = self._names_of(tasks, begun)
            kept_at = self._house.clock.monotonic()
            for number, task in enumerate(tasks):
                if task.phase != self._build.phase:
                    await self._phase(task.phase)
                if kept is not None and number < kept.done:
                    await self._say(f"cached: {task.told}")
                    continue
                await self._say(task.told)
                try:
                    await task.take(box)
                except ConflictError as error:
                    told = textwrap.shorten(task.told, _TOLD_MAX, placeholder="…")
                    raise ConflictError(f"{told}: {error.text}") from error
                now = self._house.clock.monotonic()
                if now - kept_at > _WORTH_KEEPING_S or task is tasks[-1]:
                    await self._keep_step(box, names[number])
                    kept_at = self._house.clock.monotonic()
            setting = _setting(wish, begun.config, login)
            for step in wish.steps:
                setting = setting.after(step)
            return await self._pack(box, wish, begun, about, setting)

    async def _write_secrets(self, box: Sandbox, wish: NewTemplate) -> None:
        for name, value in wish.secrets.items():
            path = f"{recipes.SECRETS}/{name}"
            await self._write(box, path, _once(value.encode()), mode=0o400)

    async def _keep_step(self, box: Sandbox, name: str) -> None:
        if self._keeps_cache:
            await self._for_later(lambda: self._house.cache.keep_step(self._actor, box.id, name))

    async def _keep_layers(self, box: Sandbox) -> None:
        if not self._keeps_cache:
            return
        build = self._build
        cache = self._house.cache
        try:
            await self._shell(box, recipes.KEEP_LAYERS)
        except SandyardError as error:
            log.debug("cannot keep the image layers of a build: %s", error.message)
            await self._for_later(lambda: cache.drop_layers(self._actor, build.slug))
            return
        await self._for_later(lambda: cache.keep_layers(self._actor, box.id, build.slug))

    async def _for_later(self, work: Callable[[], Awaitable[None]]) -> None:
        """Keep a machine for later builds; a build succeeds without it."""
        try:
            await work()
        except SandyardError as error:
            self._keeps_cache = False
            await self._say(f"not cached: {error.message}")

    async def _pack(
        self,
        box: Sandbox,
        wish: NewTemplate,
        begun: "_Begun",
        about: VersionAbout,
        setting: Setting | None = None,
    ) -> "_Made":
        """Have the root file system that was unpacked kept as a version; with a `setting`, in which
        the steps have ended, that of the machine itself."""
        house, config = self._house, begun.config
        is_stage = setting is None and wish.has_steps
        if not is_stage:
            await self._phase("pack")
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
            command |= {"env": env, "user": user, "workdir": workdir}
            data = json.dumps(command).encode()
            await self._write(box, recipes.COMMAND_FILE, _once(data))
        recipe, keeps = (recipes.PACK_TREE, "") if setting is None else (recipes.PACK_SELF, "1")
        await self._shell(box, recipe, {"WORKDIR": workdir, "KEEPS": keeps})
        release = await self._read(box, recipes.OS_FILE, _OS_MAX)
        about = replace(
            about,
            os=os_of(release),
            env=env,
            user=user,
            workdir=workdir,
            ready=wish.ready or (None if wish.is_bare else config.check),
        )
        await self._say("keeping the root file system")
        fact = await house.nodes.get(box.node_id).do(
            KeepVersion(
                box.id,
                incarnation=box.incarnation,
                path=recipes.ROOT_FILE,
                about=about,
                size_max=house.limits.size_max,
            )
        )
        await house.look_at(box)
        await self._say(f"{fact.size_bytes / 2**20:.0f} MiB")
        await self._save(stages=(*self._build.stages, fact.name))
        return _Made(fact, box.node_id or "", about, begun.source)

    # --- sandboxes ------------------------------------------------------------------------

    @asynccontextmanager
    async def _sandbox(
        self, template: Chosen, shape: Shape, *, kept: Hit | None
    ) -> AsyncIterator[Sandbox]:
        """Create a sandbox for the build, or start one that an earlier build kept. It is deleted
        after the block.

        Raises:
            _StaleCacheError: what was kept does not start.
        """
        house = self._house
        await self._phase("start a machine")
        wish = NewSandbox(
            chosen=template,
            name=_name_of(self._build),
            idle_timeout=0,
            vcpus=shape.vcpus,
            memory=f"{shape.memory_mib}MB",
            disk=f"{shape.disk_mib}MB",
            snapshot=None if kept is None else kept.snapshot_id,
            ssh_keys=[],
            auto_resume=False,
            expires_in=int(house.limits.limit_s) + 600,
            metadata={"templateBuild": self._build.id},
            mounts=(),
            # Not by default that of a machine that an earlier build has kept.
            network=self._network,
        )
        try:
            sandbox = await self._created(wish, patience_s=_PATIENCE_S if kept is None else 0)
        except (InvalidArgumentError, ConflictError, UnavailableError) as error:
            if kept is None:
                raise
            raise _StaleCacheError(error.message) from error
        try:
            await self._save(sandbox_id=sandbox.id)
            if sandbox.status is not Status.RUNNING:
                reason = sandbox.reason.message if sandbox.reason else sandbox.status.value
                if kept is not None:
                    raise _StaleCacheError(reason)
                raise InternalError(f"the machine of the build did not start: {reason}")
            yield sandbox
        finally:
            await to_the_end(self._delete(sandbox.id))

    async def _created(self, wish: NewSandbox, *, patience_s: float) -> Sandbox:
        async def create() -> Sandbox:
            return await self._house.creation.create(self._actor, wish, wait_s=_START_S)

        until = self._house.clock.monotonic() + _GOING_S
        while True:
            try:
                return await self._patiently(create, limit_s=patience_s)
            except AlreadyExistsError:  # the one before has the name until it is gone
                if self._house.clock.monotonic() > until:
                    raise
            await self._house.clock.sleep(_LOOK_AGAIN_S)

    async def _patiently(
        self, work: Callable[[], Awaitable[_T]], *, limit_s: float = _PATIENCE_S
    ) -> _T:
        """Do what may be impossible for a while, such as for lack of capacity."""
        clock = self._house.clock
        until, told = clock.monotonic() + limit_s, ""
        while True:
            try:
                return await work()
            except UnavailableError as error:
                if clock.monotonic() >= until:
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
        user: str = "root",
    ) -> None:
        """Run a command, and put its output into the log.

        Raises:
            ConflictError: it failed, printed far more than a log has, or the machine ended.
        """
        # Its end is kept, so that an agent that knows nothing of it was started again since.
        wish = ops.Run(command=command, cwd=cwd, env=dict(env or {}), user=user, keeps_end=True)
        pid = 0
        try:
            async with self._house.processes.run(self._actor, box.id, wish, _USE) as following:
                pid = following.pid
                await self._follow(following)
        except UnavailableError as error:
            if pid and await self._was_forgotten(box, pid):
                raise ConflictError(
                    "it ended every process of its machine, the agent included, as `kill -9 -1` "
                    "does"
                ) from error
            raise

    async def _follow(self, following: Following) -> None:
        text, printed, most = Lines(), 0, self._house.limits.log_bytes * _FLOOD
        async for event in following.events():
            if isinstance(event, Output):
                printed += len(event.data)
                if printed > most:
                    size = f"{most / 2**20:g} MiB"
                    raise ConflictError(
                        f"a command printed over {size}; redirect its output to a file"
                    )
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

    async def _was_forgotten(self, box: Sandbox, pid: int) -> bool:
        """Tell whether the agent of a machine answers, and does not know a process any more."""
        clock = self._house.clock
        until = clock.monotonic() + _AGENT_BACK_S
        while clock.monotonic() < until:
            try:
                await self._house.processes.get(self._actor, box.id, Which(pid=pid))
            except NotFoundError:
                return True
            except UnavailableError:  # it is about to start
                await clock.sleep(_LOOK_AGAIN_S)
            else:
                return False
        return False

    async def _write(
        self, box: Sandbox, path: str, body: AsyncIterator[bytes], *, mode: int = 0o644
    ) -> None:
        write = ops.Write(path.encode(), parents=True, mode=mode)
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
        shown = self._masks.over(text)[:LINE_MAX]
        self._log_left -= len(shown) + 32
        if self._log_left <= 0:
            shown = "the log is cut off here: it is too long"
        number = self._build.lines + 1
        self._build = replace(self._build, lines=number)
        at = self._house.clock.now()
        self._lines.append(BuildLine(number, at, self._build.phase, shown))
        if len(self._lines) >= _LINES_AT_ONCE:
            await self._flush()

    async def _flush(self) -> None:
        # Whole: lines that are written, and not known to be, would be written again.
        await to_the_end(self._write_lines())

    async def _write_lines(self) -> None:
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

    async def _publish(self, made: "_Made") -> None:
        """Make the result a version, and the template's latest unless a later one is."""
        fact = made.fact
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
            about=made.about,
            source=made.source,
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
            tags = {one: max(build.number, template.tags.get(one, 0)) for one in self._tags}
            await tx.templates.put(
                replace(template, tags={**template.tags, **tags}, updated_at=now)
            )
        self._build = build
        self._house.bus.hint(COPY)

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
            self._build, status=status, error=self._masks.over(error) if error else None,
            ended_at=self._house.clock.now(),
            phase=self._build.phase if status is BuildStatus.FAILED else "",
            plan={},
        )  # fmt: skip
        for _ in range(_ENDINGS):
            try:
                async with self._house.store.write(Turn.SHARED) as tx:
                    await tx.builds.save(self._build, lease=self._lease, lasts=None)
                    await tx.builds.prune(
                        self._build.org_id, self._build.slug, keep=LIST_MAX, keep_logs=_LOGS_KEPT
                    )
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


def _before_use(network: Policy | None) -> Policy | None:
    """Return what a version's machines may reach before they are a sandbox's. They have no
    credentials, so rules that end TLS cannot be enforced for them."""
    return None if network is None or network.ends_tls else network


def _setting(wish: NewTemplate, config: ImageConfig, login: Mapping[str, str]) -> Setting:
    """Return what the first step runs in."""
    return Setting(
        env={**config.env, **wish.env},
        user=wish.default_user or config.user,
        workdir=wish.workdir or config.workdir,
        login=login,
    )


class _StaleCacheError(Exception):
    """A machine that an earlier build kept cannot be used."""


class _LostLeaseError(Exception):
    """Another server has the build."""


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
