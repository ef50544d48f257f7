"""The mends of NFS-Ganesha's library: where it is certain, and nowhere else."""

import struct
from pathlib import Path

import pytest

from sandyard.server.node.exports.library import (
    library_of,
    mended,
    minor_versions,
    version_of,
)

_NAME = b"ganesha_unknown_owner\0"
_RELOCATIONS, _NAME_AT, _OWNER_AT, _SHIFT = 0x200, 0x300, 0x400, 0x10000
_LENGTH_AT = _OWNER_AT + 44


def a_library(*, kind: int = 8, name: bytes = _NAME, lengths: tuple[int, ...] = (21,)) -> bytes:
    """Return the least that is a library with that owner in it, its data loaded elsewhere."""
    made = bytearray(0x600)
    made[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", made, 32, 64)
    struct.pack_into("<HH", made, 54, 56, 3)
    for n, (what, start, at, size) in enumerate(
        ((1, 0, 0, 0x400), (4, 0, 0, 0x600), (1, 0x400, 0x400 + _SHIFT, 0x200))
    ):
        struct.pack_into("<IIQQQQQQ", made, 64 + 56 * n, what, 0, start, at, at, size, size, 8)
    made[_NAME_AT : _NAME_AT + len(name)] = name
    struct.pack_into("<QQQ", made, _RELOCATIONS, _OWNER_AT + 48 + _SHIFT, kind, _NAME_AT)
    struct.pack_into("<i", made, _OWNER_AT + 40, 1)
    for n, length in enumerate(lengths):
        struct.pack_into("<i", made, _LENGTH_AT + 8 * n + 8 * (n > 0), length)
    return bytes(made)


@pytest.mark.parametrize("kind", [8, 1027])
def test_only_the_length_of_the_unknown_owner_changes(kind: int) -> None:
    library = a_library(kind=kind)
    better, missing = mended(library, "4.3")
    assert missing == []
    assert [n for n in range(len(library)) if library[n] != better[n]] == [_LENGTH_AT]
    assert struct.unpack_from("<i", better, _LENGTH_AT) == (20,)


def test_what_is_not_certain_is_left_alone() -> None:
    for library in (
        b"",
        b"\x7fELF\x02\x01",
        b"\x7fELF\x02\x01" + _NAME,
        b"\x7fELF\x01\x01" + a_library()[6:],
        a_library(kind=7),
        a_library(name=b"unknown\0"),
        a_library(lengths=()),
        a_library(lengths=(21, 21)),
        a_library() + _NAME,
        a_library()[:_OWNER_AT],
    ):
        found, missing = mended(library, "4.3")
        assert found == library
        assert "locks" in missing[0]


_CALL = b"\xe8\x01\x02\x03\x04"
_REST = (
    b"\xb9\x01\x00\x00\x00", b"\x48\x8b\xb4\x24\x0a\x00\x00\x00", b"\x44\x09\xd2", b"\x0f\xb7\xd2",
)  # fmt: skip
_OPENS = b"\x0f\xb7\x54\x24\x0a\x48\x8b\xbc\x24\xa8\x00\x00\x00" + b"".join(_REST) + _CALL


def test_a_file_that_is_opened_again_is_looked_at_only_for_more_than_there_was() -> None:
    library = a_library() + b"before" + _OPENS + b"after"
    better, missing = mended(library, "6.5")
    assert missing == []
    assert len(better) == len(library)
    assert better[-len(_OPENS) - 5 :] == (
        b"\x0f\xb7\x54\x24\x0a\x48\x8b\xbc\x24\xa8\x00\x00\x00\x48\x8b\xb4\x24\x0a\x00\x00\x00"
        b"\x89\xd1\x44\x09\xd2\x66\x39\xd1\x0f\x95\xc1" + _CALL + b"after"
    )
    for version in ("4.3", "6.3", "6.6", "7.0", ""):  # where nothing is wrong
        assert mended(library, version)[0].endswith(_OPENS + b"after")
    for other in (
        a_library(),
        a_library() + _OPENS + _OPENS,
        a_library() + _OPENS[: -len(_CALL)],
        a_library() + _OPENS.replace(b"\xb9\x01", b"\xb9\x00"),
    ):
        found, missing = mended(other, "6.5")
        assert found[_LENGTH_AT + 4 :] == other[_LENGTH_AT + 4 :]
        assert "git clone" in missing[0]


def test_the_library_of_this_host_is_known() -> None:
    library = library_of()
    if library is None:
        pytest.skip("NFS-Ganesha is not installed here")
    before = library.read_bytes()
    better, missing = mended(before, version_of(library))
    assert missing == []
    changed = sum(one != other for one, other in zip(before, better, strict=True))
    assert 1 <= changed <= 33


def test_a_library_is_found_by_its_name_of_this_version(tmp_path: Path) -> None:
    assert library_of(tmp_path) is None
    place = tmp_path / "usr/lib/x86_64-linux-gnu"
    place.mkdir(parents=True)
    (place / "libganesha_nfsd.so.4.3").write_bytes(b"")
    (place / "libganesha_nfsd.so.4").symlink_to("libganesha_nfsd.so.4.3")
    assert library_of(tmp_path) == place / "libganesha_nfsd.so.4.3"


def test_old_ones_are_not_asked_for_what_they_read_wrong() -> None:
    for name, minors in (
        ("libganesha_nfsd.so.6.5", "1,2"),
        ("libganesha_nfsd.so.10.1", "1,2"),
        ("libganesha_nfsd.so.4.3", "1"),
        ("libganesha_nfsd.so", "1"),
        ("libganesha_nfsd.so.next", "1"),
    ):
        assert minor_versions(Path("/usr/lib/ganesha") / name) == minors
    assert minor_versions(None) == "1"
