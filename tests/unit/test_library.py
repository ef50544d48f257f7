"""The one mend of NFS-Ganesha's library: where it is certain, and nowhere else."""

import struct
from pathlib import Path

import pytest

from sandyard.server.node.exports.library import library_of, mended, minor_versions

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
    better = mended(library)
    assert better is not None
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
        assert mended(library) is None


def test_the_library_of_this_host_is_known() -> None:
    library = library_of()
    if library is None:
        pytest.skip("NFS-Ganesha is not installed here")
    before = library.read_bytes()
    better = mended(before)
    assert better is not None
    assert sum(one != other for one, other in zip(before, better, strict=True)) == 1


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
