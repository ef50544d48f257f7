"""Capacity of a node: whether another machine can start now, and making room for it."""

from sandyard.server.core.errors import NoCapacityError
from sandyard.server.core.shapes import Shape
from sandyard.server.node.host.admission import Admission, Room
from sandyard.server.node.host.ledger import Ledger
from sandyard.server.node.images.images import Images
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import Pool


class Capacity:
    """Decides from the host's free resources, what is reserved, and what waits in the pool."""

    def __init__(
        self, admission: Admission, ledger: Ledger, images: Images, goldens: Goldens, pool: Pool
    ) -> None:
        self._admission = admission
        self._ledger = ledger
        self._images = images
        self._goldens = goldens
        self._pool = pool

    @property
    def is_short_of_memory(self) -> bool:
        """See Admission.is_short_of_memory."""
        return self._admission.is_short_of_memory

    def room(self) -> Room:
        """Return what can still be reserved."""
        return self._admission.room()

    def check_disk(self, shape: Shape) -> None:
        """See Admission.check_disk."""
        self._admission.check_disk(shape)

    async def find_room(self, template: str, shape: Shape, *, count: int = 1) -> bool:
        """See core.node_ops.FindRoom."""
        image = self._images.current(template)
        # Each machine that is about to start may claim one of the pool.
        coming = self._ledger.totals().coming
        if count == 1 and image is not None:
            kind = self._goldens.kind_of(image, template, shape)
            if self._pool.has(kind, shape.disk_mib, besides=coming):
                # It runs already, so its resources are reserved.
                self._admission.check_growth(shape.disk_mib - kind.disk_mib)
                return True
        await self.make_room(shape, count=count)
        return False

    async def make_room(self, shape: Shape, *, count: int = 1, is_promised: bool = False) -> None:
        """Return if there is capacity, and end machines of the pool if that makes it so.

        Raises: see `Admission.check`.
        """
        try:
            self._admission.check(shape, count=count, is_promised=is_promised)
        except NoCapacityError:
            memory_mib = self._admission.missing_memory_mib(shape, count=count)
            disk_mib = 0 if is_promised else self._admission.missing_disk_mib(shape, count=count)
            if not await self._pool.give_way(memory_mib, disk_mib):
                raise
            self._admission.check(shape, count=count, is_promised=is_promised)
