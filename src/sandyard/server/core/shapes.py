"""Shapes: how many virtual CPUs, how much memory, how large a disk.

Units are binary throughout: 1GB is 1024 MiB, as the HTTP contract says.
"""

import re
from dataclasses import dataclass

from sandyard.server.core.errors import InvalidArgumentError

_SIZE = re.compile(r"([0-9]{1,9})(MB|GB|MiB|GiB)")

VCPUS = range(1, 33)
MEMORY_MIB = range(128, 64 * 1024 + 1)
DISK_MIB = range(1024, 500 * 1024 + 1)


@dataclass(frozen=True)
class Shape:
    """What a machine is given: virtual CPUs, memory and disk in MiB."""

    vcpus: int
    memory_mib: int
    disk_mib: int


NOTHING = Shape(0, 0, 0)


@dataclass(frozen=True)
class ShapeSeconds:
    """Shapes, each times the seconds for which it was used, added up."""

    vcpu_seconds: int = 0
    memory_mib_seconds: int = 0
    disk_mib_seconds: int = 0


def parse_size(text: str, *, field: str) -> int:
    """Return the MiB that a size such as `4GB`, `1024MB` or `512MiB` means.

    Raises:
        InvalidArgumentError: `text` has another form; `facts` name the field.
    """
    match = _SIZE.fullmatch(text)
    if match is None or not text.isascii():
        raise InvalidArgumentError(
            "cannot read {field}: it must be a whole number and MB or GB, such as 512MB or 4GB",
            field=field,
        )
    number, unit = int(match[1]), match[2]
    return number * 1024 if unit.startswith("G") else number


def format_size(mib: int) -> str:
    """Return MiB as the contract prints them: whole GB where it can, else MB."""
    return f"{mib // 1024}GB" if mib % 1024 == 0 and mib else f"{mib}MB"


def shape_of(
    default: Shape, *, vcpus: int | None = None, memory: str | None = None, disk: str | None = None
) -> Shape:
    """Return `default` with what the caller asked for in its place.

    Raises:
        InvalidArgumentError: a value that cannot be read or is out of range.
    """
    shape = Shape(
        vcpus=default.vcpus if vcpus is None else vcpus,
        memory_mib=default.memory_mib
        if memory is None
        else parse_size(memory, field="resources.memory"),
        disk_mib=default.disk_mib if disk is None else parse_size(disk, field="resources.disk"),
    )
    if shape.vcpus not in VCPUS:
        raise InvalidArgumentError(
            f"cannot give {shape.vcpus} vcpus: it must be 1 to 32", field="resources.vcpus"
        )
    if shape.memory_mib not in MEMORY_MIB:
        raise InvalidArgumentError(
            f"cannot give {format_size(shape.memory_mib)} of memory: it must be 128MB to 64GB",
            field="resources.memory",
        )
    if shape.disk_mib not in DISK_MIB:
        raise InvalidArgumentError(
            f"cannot give a disk of {format_size(shape.disk_mib)}: it must be 1GB to 500GB",
            field="resources.disk",
        )
    return shape
