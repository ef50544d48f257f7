"""What is known of NFS-Ganesha's library, by its version, and a mend for a copy of it.

Only the server sees that copy. Who asks for a lock that another holds is told who that is; or, if
it means to wait, of an owner that is not known: "ganesha_unknown_owner", 21 bytes
(`Process_nfs4_conflict` in its SAL/nfs4_owner.c). Linux's clients have room for an owner of 20, as
their own are (`lock_owner_id_maxsz` in its fs/nfs/nfs4xdr.c): they cannot read the answer, and
`flock` and `fcntl` end in EIO where they should have waited. With a byte less in the length of that
name, which nobody looks at, they wait.
"""

import struct
from pathlib import Path

_PLACES = ("usr/lib/ganesha", "usr/lib64/ganesha", "usr/lib/*-linux-gnu", "usr/lib", "usr/lib64")
_OWNER = b"ganesha_unknown_owner"
_ROOM = 20
_READS_WELL = 6
_ELF_64_LITTLE = b"\x7fELF\x02\x01"
_LOAD = 1
# "What is loaded lies elsewhere: add that", on x86-64 and on 64-bit ARM; ELF's psABI of each.
_RELATIVE = (8, 1027)
_AROUND = range(-64, 64, 4)


def library_of(root: Path = Path("/")) -> Path | None:
    """Return where Ganesha's library is on a host; None if it is not."""
    found = (one for place in _PLACES for one in sorted(root.glob(f"{place}/libganesha_nfsd.so.*")))
    return next((one for one in found if one.is_file() and not one.is_symlink()), None)


def minor_versions(library: Path | None) -> str:
    """Return what of NFSv4 such a library can be trusted with: "1,2" or "1".

    By NFSv4.2, Ganesha 4.3 reads zeros where data is (READ_PLUS; tried with Linux 6.12, which asks
    so). 6.5 does not.
    """
    major = "" if library is None else library.name.partition(".so.")[2].partition(".")[0]
    return "1,2" if major.isdecimal() and int(major) >= _READS_WELL else "1"


def mended(library: bytes) -> bytes | None:
    """Return such a library with a shorter name for an unknown owner of locks.

    None if it is not known for certain where its length stands: a library of another kind.
    """
    try:
        at = _length_of_owner(library)
    except struct.error:
        return None
    if at is None:
        return None
    return library[:at] + struct.pack("<i", _ROOM) + library[at + 4 :]


def _length_of_owner(library: bytes) -> int | None:
    """Find the number beside the one pointer to the name."""
    if not library.startswith(_ELF_64_LITTLE) or library.count(_OWNER + b"\0") != 1:
        return None
    segments = _segments(library)
    name = _address(segments, library.find(_OWNER))
    for kind in _RELATIVE:
        entry = struct.pack("<QQ", kind, name)
        if library.count(entry) == 1:
            (pointer,) = struct.unpack_from("<Q", library, library.find(entry) - 8)
            at = _offset(segments, pointer)
            around = (at + step for step in _AROUND if 0 <= at + step <= len(library) - 4)
            lengths = [
                one for one in around if struct.unpack_from("<i", library, one)[0] == len(_OWNER)
            ]
            return lengths[0] if len(lengths) == 1 else None
    return None


def _segments(library: bytes) -> list[tuple[int, int, int]]:
    """Return what is loaded: offset in the file, address, size."""
    (table,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    heads = (struct.unpack_from("<IIQQQQ", library, table + n * size) for n in range(count))
    return [(head[2], head[3], head[5]) for head in heads if head[0] == _LOAD]


def _address(segments: list[tuple[int, int, int]], offset: int) -> int:
    return next(
        (at + offset - start for start, at, size in segments if 0 <= offset - start < size), -1
    )


def _offset(segments: list[tuple[int, int, int]], address: int) -> int:
    return next(
        (start + address - at for start, at, size in segments if 0 <= address - at < size), -1
    )
