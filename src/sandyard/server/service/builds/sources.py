"""Where root file systems come from: an image of a registry, an uploaded image, a Dockerfile.

Each is unpacked by a machine of the hidden template `builder`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from typing_extensions import override

from sandyard.server.core.contracts.node import VersionFact
from sandyard.server.core.errors import ConflictError
from sandyard.server.core.records import VersionAbout
from sandyard.server.core.wire import printable
from sandyard.server.service.builds import recipes
from sandyard.server.service.builds.boxes import Box
from sandyard.server.service.builds.builds import actor_of
from sandyard.server.service.builds.config import ImageConfig
from sandyard.server.service.builds.keeping import Keeping
from sandyard.server.service.builds.plan import NewTemplate
from sandyard.server.service.builds.progress import Progress
from sandyard.server.service.builds.tools import BuildTools

_DIGEST_MAX = 200


@dataclass(frozen=True)
class Made:
    """A version that a node keeps, and its source."""

    fact: VersionFact
    node_id: str
    about: VersionAbout
    source: Mapping[str, object]


@dataclass(frozen=True)
class Begun:
    """What steps begin with: the settings, the source, and what identifies the root file system.
    `base` is the template to start a machine of, and `made` is that as a version; both are None if
    only a machine that was kept has it."""

    config: ImageConfig
    source: Mapping[str, object]
    origin: Sequence[object]
    base: str | None = None
    made: Made | None = None


class Source(ABC):
    """A source that has to be unpacked."""

    def __init__(self, tools: BuildTools, progress: Progress, wish: NewTemplate) -> None:
        self.tools = tools
        self.progress = progress
        self.wish = wish

    async def find(self, box: Box, registry: Mapping[str, str]) -> Begun | None:
        """Look the source up; None if it is not known before it is unpacked."""
        return None

    @abstractmethod
    async def unpack(self, box: Box, registry: Mapping[str, str]) -> Begun:
        """Unpack it. `registry` has the variables for commands that use the registry."""


class ImageSource(Source):
    """An image of a registry."""

    @override
    async def find(self, box: Box, registry: Mapping[str, str]) -> Begun:
        assert self.wish.image is not None
        await self.progress.phase("pull")
        await box.shell(recipes.FIND_IMAGE, {**registry, "IMAGE": pinned(self.wish.image)})
        return await self._begun(box)

    @override
    async def unpack(self, box: Box, registry: Mapping[str, str]) -> Begun:
        await box.shell(recipes.PULL_IMAGE, registry)
        await self.progress.phase("unpack")
        await box.shell(recipes.UNPACK)
        return await self._begun(box)

    async def _begun(self, box: Box) -> Begun:
        found = await box.read(f"{recipes.FOLDER}/digest", _DIGEST_MAX)
        digest = printable(found.decode(errors="replace").strip())
        source = {"image": self.wish.image, "digest": digest}
        return Begun(await box.read_config(), source, ["image", digest])


class UploadSource(Source):
    """An uploaded archive of an image."""

    @override
    async def unpack(self, box: Box, registry: Mapping[str, str]) -> Begun:
        upload = str(self.wish.upload)
        await self.progress.phase("unpack")
        await box.shell(recipes.FETCH_UPLOAD)
        await box.read_config()  # refused before all of it is unpacked
        actor = actor_of(self.progress.build)
        known = await self.tools.uploads.find(actor, upload, field="upload")
        await box.shell(recipes.UNPACK)
        return Begun(await box.read_config(), {"upload": upload}, ["upload", known.digest])


class DockerfileSource(Source):
    """A Dockerfile. Its image layers are kept, also if an instruction fails."""

    def __init__(
        self, tools: BuildTools, progress: Progress, wish: NewTemplate, keeping: Keeping
    ) -> None:
        super().__init__(tools, progress, wish)
        self._keeping = keeping

    @override
    async def unpack(self, box: Box, registry: Mapping[str, str]) -> Begun:
        assert self.wish.dockerfile is not None
        await self.progress.phase("build")
        await box.write(recipes.DOCKERFILE, self.wish.dockerfile.encode())
        await box.write_secrets(self.wish.secrets)
        try:
            await box.shell(recipes.BUILD, {**registry, "FORCE": "1" if self.wish.force else ""})
        except ConflictError:  # of an instruction; those before it need not be repeated
            await self._keeping.keep_layers(box)
            raise
        built = await box.read(f"{recipes.FOLDER}/image-id", _DIGEST_MAX)
        origin = ["dockerfile", built.decode(errors="replace")]
        return Begun(await box.read_config(), {"dockerfile": True}, origin)


def pinned(image: str) -> str:
    """Return a reference without its tag if it has a digest; skopeo does not take both."""
    name, at, digest = image.partition("@")
    if not at:
        return image
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}@{digest}"
