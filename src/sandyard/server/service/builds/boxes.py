"""The sandboxes of a build, and what a build does in them."""

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from sandyard.server.core import ops
from sandyard.server.core.contracts.node import VersionFact
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
from sandyard.server.core.node_ops import KeepVersion
from sandyard.server.core.records import Build, Sandbox, VersionAbout
from sandyard.server.core.states import Status
from sandyard.server.service.builds import recipes
from sandyard.server.service.builds.builds import actor_of
from sandyard.server.service.builds.cache import Hit
from sandyard.server.service.builds.config import CONFIG_MAX, ImageConfig, read_config
from sandyard.server.service.builds.output import Lines
from sandyard.server.service.builds.progress import PATIENCE_S, Progress
from sandyard.server.service.builds.steps import Work
from sandyard.server.service.builds.tools import BuildTools
from sandyard.server.service.sandboxes.create import NewSandbox
from sandyard.server.service.sandboxes.processes import Following, Output, Which
from sandyard.server.service.sandboxes.uses import Use
from sandyard.server.service.templates.templates import Chosen
from sandyard.server.tasks import to_the_end

log = logging.getLogger(__name__)

_START_S: Final = 300.0
_AGENT_BACK_S: Final = 30.0
_LOOK_AGAIN_S: Final = 0.2
_GOING_S: Final = 120.0
_FLOOD: Final = 32  # times the size of a log
_USE = Use("template.step", "", "run a step of a build in", is_in_feed=False)


class StaleCacheError(Exception):
    """A machine that an earlier build kept cannot be used."""


class Box:
    """A running sandbox of a build."""

    def __init__(self, tools: BuildTools, progress: Progress, sandbox: Sandbox) -> None:
        self._tools = tools
        self._services = tools.sandboxes
        self._progress = progress
        self._actor = actor_of(progress.build)
        self._sandbox = sandbox

    @property
    def id(self) -> str:
        """The sandbox's id."""
        return self._sandbox.id

    @property
    def node_id(self) -> str:
        """The node that it is on."""
        return self._sandbox.node_id or ""

    # --- commands -------------------------------------------------------------------------

    async def shell(
        self,
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
            async with self._services.processes.run(self._actor, self.id, wish, _USE) as following:
                pid = following.pid
                await self._follow(following)
        except UnavailableError as error:
            if pid and await self._was_forgotten(pid):
                raise ConflictError(
                    "it ended every process of its machine, the agent included, as `kill -9 -1` "
                    "does"
                ) from error
            raise

    async def do(self, work: Work) -> None:
        """Do the work of a step. Raises: see `shell`."""
        if work.upload is not None:
            await self.write_upload(recipes.ARCHIVE, work.upload)
        await self.shell(work.command, work.env, cwd=work.cwd, user=work.user)

    async def _follow(self, following: Following) -> None:
        text, printed, most = Lines(), 0, self._tools.limits.log_bytes * _FLOOD
        async for event in following.events():
            if isinstance(event, Output):
                printed += len(event.data)
                if printed > most:
                    size = f"{most / 2**20:g} MiB"
                    raise ConflictError(
                        f"a command printed over {size}; redirect its output to a file"
                    )
                # What is cut off is not worth being taken apart.
                for one in () if self._progress.is_cut_off else text.feed(event.data):
                    await self._progress.say(one)
                continue
            for one in text.end():
                await self._progress.say(one)
            if event.exit_code != 0:
                how = f"by {event.signal}" if event.signal else f"with {event.exit_code}"
                raise ConflictError(f"a command ended {how}; the log shows what it printed")
            return
        raise UnavailableError("the machine of the build ended during a command")

    async def _was_forgotten(self, pid: int) -> bool:
        """Tell whether the machine's agent answers, and does not know a process any more."""
        clock = self._progress.clock
        until = clock.monotonic() + _AGENT_BACK_S
        while clock.monotonic() < until:
            try:
                await self._services.processes.get(self._actor, self.id, Which(pid=pid))
            except NotFoundError:
                return True
            except UnavailableError:  # it is about to start
                await clock.sleep(_LOOK_AGAIN_S)
            else:
                return False
        return False

    # --- files ----------------------------------------------------------------------------

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file, and the folders above it."""
        await self._write(path, _once(data), mode)

    async def write_upload(self, path: str, upload: str) -> None:
        """Write an upload to a file."""
        await self._write(path, self._tools.uploads.read(upload), 0o644)

    async def write_secrets(self, secrets: Mapping[str, str]) -> None:
        """Write the build's secrets to where its commands find them."""
        for name, value in secrets.items():
            await self.write(f"{recipes.SECRETS}/{name}", value.encode(), mode=0o400)

    async def _write(self, path: str, body: AsyncIterator[bytes], mode: int) -> None:
        write = ops.Write(path.encode(), parents=True, mode=mode)
        await self._services.files.write(self._actor, self.id, write, body)

    async def read(self, path: str, most: int) -> bytes:
        """Return what a file has.

        Raises:
            InvalidArgumentError: it has more than `most` bytes.
        """
        found = bytearray()
        wish = ops.Read(path.encode())
        async with self._services.files.read(self._actor, self.id, wish) as reading:
            async for piece in reading.pieces(most + 1):
                found += piece
        if len(found) > most:
            raise InvalidArgumentError(f"cannot use the image: its {path} is over {most} bytes")
        return bytes(found)

    async def read_config(self) -> ImageConfig:
        """Return the configuration of the image that was looked up or unpacked."""
        return read_config(await self.read(recipes.CONFIG, CONFIG_MAX))

    # --- the result -----------------------------------------------------------------------

    async def write_command(self, command: Mapping[str, object]) -> None:
        """Write what is to run in all sandboxes of the version."""
        await self.write(recipes.COMMAND_FILE, json.dumps(command).encode())

    async def keep_root(self, about: VersionAbout) -> VersionFact:
        """Have the node keep the packed root file system as a version."""
        nodes = self._tools.platform.nodes
        node = nodes.get(self._sandbox.node_id)
        fact = await node.do(
            KeepVersion(
                self.id,
                incarnation=self._sandbox.incarnation,
                path=recipes.ROOT_FILE,
                about=about,
                size_max=self._tools.limits.size_max,
            )
        )
        with suppress(UnavailableError):  # placement believes older reports otherwise
            await nodes.report_of(node)
        return fact


class Boxes:
    """Starts and deletes the sandboxes of one build."""

    def __init__(self, tools: BuildTools, progress: Progress) -> None:
        self._tools = tools
        self._progress = progress
        self._actor = actor_of(progress.build)

    @asynccontextmanager
    async def open(
        self, template: Chosen, network: Policy | None, *, kept: Hit | None
    ) -> AsyncIterator[Box]:
        """Create a sandbox of a template's default shape, or start one that an earlier build kept.
        It reaches what `network` allows, and is deleted after the block.

        Raises:
            StaleCacheError: what was kept does not start.
        """
        await self._progress.phase("start a machine")
        shape = template.defaults
        wish = NewSandbox(
            chosen=template,
            name=_name_of(self._progress.build),
            idle_timeout=0,
            vcpus=shape.vcpus,
            memory=f"{shape.memory_mib}MB",
            disk=f"{shape.disk_mib}MB",
            snapshot=None if kept is None else kept.snapshot_id,
            ssh_keys=[],
            auto_resume=False,
            expires_in=int(self._tools.limits.limit_s) + 600,
            metadata={"templateBuild": self._progress.build.id},
            mounts=(),
            # Not by default that of a machine that an earlier build has kept.
            network=network or NO_RULES,
        )
        try:
            sandbox = await self._created(wish, patience_s=PATIENCE_S if kept is None else 0)
        except (InvalidArgumentError, ConflictError, UnavailableError) as error:
            if kept is None:
                raise
            raise StaleCacheError(error.message) from error
        try:
            await self._progress.save(sandbox_id=sandbox.id)
            if sandbox.status is not Status.RUNNING:
                reason = sandbox.reason.message if sandbox.reason else sandbox.status.value
                if kept is not None:
                    raise StaleCacheError(reason)
                raise InternalError(f"the machine of the build did not start: {reason}")
            yield Box(self._tools, self._progress, sandbox)
        finally:
            await to_the_end(self._delete(sandbox.id))

    async def delete_left(self) -> None:
        """Delete the sandbox that an earlier attempt left, and wait for its end."""
        await self._delete(_name_of(self._progress.build), wait=True)

    async def _created(self, wish: NewSandbox, *, patience_s: float) -> Sandbox:
        async def create() -> Sandbox:
            return await self._tools.sandboxes.creation.create(self._actor, wish, wait_s=_START_S)

        clock = self._progress.clock
        until = clock.monotonic() + _GOING_S
        while True:
            try:
                return await self._progress.patiently(create, limit_s=patience_s)
            except AlreadyExistsError:  # the one before has the name until it is gone
                if clock.monotonic() > until:
                    raise
            await clock.sleep(_LOOK_AGAIN_S)

    async def _delete(self, reference: str, *, wait: bool = False) -> None:
        try:
            await self._tools.sandboxes.sandboxes.delete(self._actor, reference, wait=wait)
        except NotFoundError:
            pass
        except SandyardError as error:  # it is deleted at its end
            log.warning("cannot delete the sandbox of a build yet: %s", error.message)


def _name_of(build: Build) -> str:
    """Return the name of the sandbox of a build."""
    return f"build-{build.id}"


async def _once(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
