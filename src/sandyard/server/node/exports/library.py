"""What is known of NFS-Ganesha's library, by its version, and mends for a copy of it.

Only the server sees that copy, and nothing in it is changed of which it is not certain what it is.

**Locks that are waited for.** Who asks for a lock that another holds is told who that is; or, if
it means to wait, of an owner that is not known: "ganesha_unknown_owner", 21 bytes
(`Process_nfs4_conflict` in its SAL/nfs4_owner.c). Linux's clients have room for an owner of 20, as
their own are (`lock_owner_id_maxsz` in its fs/nfs/nfs4xdr.c): they cannot read the answer, and
`flock` and `fcntl` end in EIO where they should have waited. With a byte less in the length of that
name, which nobody looks at, they wait.

**Files that are opened again.** A client that has a file open and opens it once more, as the same
user, asks for what it had and what it wants together (`open4_ex` in its nfs4_op_open.c). Versions
6.4 and 6.5 look whether the user may have all of that by the mode of the file: one that was made
read-only, and is still open for writing as it may be (every pack of `git clone`), cannot be opened
for reading by anybody but root (nfs-ganesha's issue 1219; later ones are mended). In the copy they
look only if it asks for something that it does not have.
"""

import re
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
_REFUSES_AGAIN = ("6.4", "6.5")
# x86-64: what is open already comes into %edx and what is asked for on top, 1 into %ecx for "look
# whether they may", the state and the file into %rsi and %rdi, and the file is opened again.
_OPENS_AGAIN = re.compile(
    rb"(\x0f\xb7\x54\x24.)(\x48\x8b\xbc\x24.{4})\xb9\x01\x00\x00\x00(\x48\x8b\xb4\x24.{4})"
    rb"\x44\x09\xd2\x0f\xb7\xd2(?=\xe8)",
    re.DOTALL,
)
# In as many bytes: %cl is 1 if the two together (%dx, after the `or`) are not what is open already
# (kept in %ecx before it). That %edx is widened there again is done by whoever is called, too.
_LOOKS_IF_MORE = b"\x89\xd1\x44\x09\xd2\x66\x39\xd1\x0f\x95\xc1"


def library_of(root: Path = Path("/")) -> Path | None:
    """Return where Ganesha's library is on a host; None if it is not."""
    found = (one for place in _PLACES for one in sorted(root.glob(f"{place}/libganesha_nfsd.so.*")))
    return next((one for one in found if one.is_file() and not one.is_symlink()), None)


def minor_versions(library: Path | None) -> str:
    """Return what of NFSv4 such a library can be trusted with: "1,2" or "1".

    By NFSv4.2, Ganesha 4.3 reads zeros where data is (READ_PLUS; tried with Linux 6.12, which asks
    so). 6.5 does not.
    """
    major = "" if library is None else version_of(library).partition(".")[0]
    return "1,2" if major.isdecimal() and int(major) >= _READS_WELL else "1"


def mended(library: bytes, version: str) -> tuple[bytes, list[str]]:
    """Return such a library with what is mended in it, as far as it is certain where that is, and a
    sentence on each thing that is not as it should be.

    `version` is Ganesha's, such as 6.5.
    """
    missing = []
    try:
        at = _length_of_owner(library)
    except struct.error:
        at = None
    if at is None:
        missing.append("waiting for locks may not work in workspaces")
    else:
        library = library[:at] + struct.pack("<i", _ROOM) + library[at + 4 :]
    if version in _REFUSES_AGAIN:
        if len(_OPENS_AGAIN.findall(library)) == 1:
            library = _OPENS_AGAIN.sub(_again, library)
        else:
            missing.append("git clone may not work in workspaces, but for root")
    return library, missing


def version_of(library: Path) -> str:
    """Return the version in a library's name, such as 6.5; nothing if there is none."""
    return library.name.partition(".so.")[2]


def _again(found: re.Match[bytes]) -> bytes:
    mended = found[1] + found[2] + found[3] + _LOOKS_IF_MORE
    assert len(mended) == len(found[0])
    return mended


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
            if at < 0:
                return None
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
