"""The operations of nodes themselves, by which templates and versions are copied between them.

They are opened like an agent's (`contracts.node.NodeTunnel`), with a `MachineRef` to no sandbox.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandyard.server.core import ops
from sandyard.server.core.codec import decode
from sandyard.server.core.ops import Op, Operation


@dataclass(frozen=True)
class CopiedFile:
    """A file of a copy."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Copy:
    """What is copied: a template of the installation by its slug, or a version by its name
    (`contracts.node.version_name`). `digest` is that of the template's image, or empty; `files`
    come one after the other, without anything between them."""

    name: str
    digest: str
    files: tuple[CopiedFile, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(one.size_bytes for one in self.files)


@dataclass(frozen=True)
class ReadCopy(Operation[Copy]):
    """Read a template or version: the bytes of its files follow the answer."""

    op = Op.READ_COPY
    answer = Copy

    name: str


@dataclass(frozen=True)
class Wanted:
    """Whether the files of a copy are wanted: they are not if the node has it."""

    is_wanted: bool


@dataclass(frozen=True)
class WriteCopy(Operation[Wanted]):
    """Write a template or version: the bytes of its files follow the answer if they are wanted. The
    other direction ends once it can be used, or with the error."""

    op = Op.WRITE_COPY
    answer = Wanted

    copy: Copy


_BY_OP: Mapping[str, type[ReadCopy] | type[WriteCopy]] = {
    kind.op.value: kind for kind in (ReadCopy, WriteCopy)
}


def operation_of(op: str, args: Mapping[str, object]) -> Operation[Any]:
    """Return the requested operation of a node, or of an agent. See `ops.operation_of`."""
    kind = _BY_OP.get(op)
    if kind is None:
        return ops.operation_of(op, args)
    operation: ReadCopy | WriteCopy = decode(kind, args)
    return operation
