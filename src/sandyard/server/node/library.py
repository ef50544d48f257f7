"""What users' templates and copies leave on a node: versions that are kept and dropped, and images
that nothing needs any more."""

from typing import assert_never

from sandyard.server.core.contracts.node import VersionFact
from sandyard.server.core.node_ops import (
    DropStages,
    DropVersion,
    KeepVersion,
    PrepareVersion,
    VersionRequest,
)
from sandyard.server.core.ops import Read
from sandyard.server.core.shapes import Shape
from sandyard.server.node.agent import content_of
from sandyard.server.node.capacity import Capacity
from sandyard.server.node.machines.means import Means
from sandyard.server.node.owners import Owners
from sandyard.server.node.snapshots import KeptSnapshots
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.tasks import in_thread


class Library:
    """Keeps versions, and removes images that no template, machine or snapshot needs."""

    def __init__(
        self,
        means: Means,
        owners: Owners,
        snapshots: KeptSnapshots,
        capacity: Capacity,
        goldens: Goldens,
    ) -> None:
        self._means = means
        self._owners = owners
        self._snapshots = snapshots
        self._capacity = capacity
        self._goldens = goldens

    async def do(self, asked: VersionRequest) -> object:
        """Carry out an operation on versions, and return its answer."""
        match asked:
            case KeepVersion():
                return await self._keep(asked)
            case PrepareVersion():
                await self._prepare(asked.version)
            case DropVersion():
                await self._drop(asked.version)
            case DropStages():
                await self._drop_stages(asked)
            case _:
                assert_never(asked)
        return None

    async def _keep(self, asked: KeepVersion) -> VersionFact:
        self._capacity.check_disk(Shape(1, 0, asked.size_max >> 20))
        guest = self._owners.reached(asked.sandbox_id, asked.incarnation).resident.guest
        async with guest.open(Read(asked.path.encode())) as opened:
            pieces = content_of(opened.stream, self._means.clock)
            versions = self._means.images.versions
            fact = await versions.keep(asked.about, pieces, size_max=asked.size_max)
        self._means.on_change()
        return fact

    async def _prepare(self, version: str) -> None:
        definition, image = self._means.images.get(version)
        await self._goldens.make(self._goldens.kind_of(image, version, definition.defaults))

    async def _drop(self, version: str) -> None:
        await in_thread(self._means.images.versions.drop, version)
        await self._goldens.forget_old()
        await in_thread(self.drop_images)
        self._means.on_change()

    async def _drop_stages(self, asked: DropStages) -> None:
        versions = self._means.images.versions
        for name in await in_thread(versions.names, asked.build_id):
            if name not in asked.but:
                await self._drop(name)

    def drop_images(self) -> None:
        """Remove the images of versions, and copies, that nothing here needs any more."""
        self._means.images.drop_old(self._needed, now=self._means.clock.now())

    def drop_copies(self) -> None:
        """Remove the copies that nothing here needs any more."""
        self._means.images.drop_copies(self._needed, now=self._means.clock.now())

    def _needed(self) -> set[str]:
        return self._snapshots.images() | {one.image for one in self._means.records.all()}
