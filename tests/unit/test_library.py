"""The patches of NFS-Ganesha's library: for builds that are known, and for no other."""

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from sandyard.server.core.contracts.node import MountWish
from sandyard.server.node.exports import library as ganesha
from sandyard.server.node.exports import only_reads
from sandyard.server.node.exports.library import (
    BUILDS,
    Build,
    Feature,
    library_of,
    lock_options,
    minor_versions,
    missing_here,
    note_verdict,
    patched,
    verdict_in,
)
from sandyard.server.node.exports.server import configuration
from sandyard.server.node.exports.shares import Share, new_share

LIBRARY = b"\x7fELF before 15 and after"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Build:
    """A build of the test's own, whose 15 becomes 14."""
    after = LIBRARY.replace(b"15", b"14")
    at = LIBRARY.index(b"15")
    build = Build("test", sha256(after).hexdigest(), ((at, b"15".hex(), b"14".hex()),))
    monkeypatch.setattr(ganesha, "BUILDS", {sha256(LIBRARY).hexdigest(): build})
    return build


def test_a_known_build_is_patched_to_what_is_known_of_it(known: Build) -> None:
    assert patched(LIBRARY) == LIBRARY.replace(b"15", b"14")


def test_a_build_that_differs_in_a_byte_runs_as_it_is(known: Build) -> None:
    other = LIBRARY.replace(b"after", b"After")
    assert patched(other) == other
    assert patched(b"") == b""


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ("4.3", {Feature.LOCKS}), ("9.14", {Feature.LOCKS}), ("6.5", set(Feature)),
        ("6.4", {Feature.LOCKS, Feature.REOPENED}), ("next", {Feature.LOCKS}),
    ],
)  # fmt: skip
def test_what_an_unknown_build_lacks_follows_from_its_version(
    known: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str,
    missing: set[Feature],
) -> None:  # fmt: skip
    library = tmp_path / f"libganesha_nfsd.so.{version}"
    monkeypatch.setattr(ganesha, "library_of", lambda: library)
    library.write_bytes(LIBRARY + b" of another build")
    assert set(missing_here(verdict_in(tmp_path))) == missing
    library.write_bytes(LIBRARY)
    assert missing_here(verdict_in(tmp_path)) == known.missing == ()


def test_a_patch_that_comes_to_something_else_is_never_used(
    known: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (
        replace(known, digest="0" * 64),
        replace(known, changes=((0, b"15".hex(), b"14".hex()),)),
    ):
        monkeypatch.setattr(ganesha, "BUILDS", {sha256(LIBRARY).hexdigest(): wrong})
        with pytest.raises(AssertionError):
            patched(LIBRARY)


def test_every_known_build_changes_as_many_bytes_as_there_were() -> None:
    for build in BUILDS.values():
        assert build.changes
        for _, before, after in build.changes:
            assert len(before) == len(after)
            assert before != after


def test_the_library_of_this_host_is_known() -> None:
    library = library_of()
    if library is None:
        pytest.skip("NFS-Ganesha is not installed here")
    assert missing_here(verdict_in(Path("/nonexistent"))) == ()
    assert patched(library.read_bytes()) != library.read_bytes()


def test_a_test_decides_and_the_digest_where_there_was_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libganesha_nfsd.so.6.5"
    library.write_bytes(LIBRARY)
    monkeypatch.setattr(ganesha, "library_of", lambda: library)
    verdict = verdict_in(tmp_path)
    unknown = (Feature.LOCKS, Feature.WAITING, Feature.REOPENED)
    assert missing_here(verdict) == unknown
    for found in ((), (Feature.WAITING,)):
        note_verdict(verdict, library, found)
        assert missing_here(verdict) == found
    # One of another library, or that cannot be read, decides nothing.
    library.write_bytes(LIBRARY + b" upgraded")
    assert missing_here(verdict) == unknown
    for broken in ("", "[]", '{"library": 1}', '{"missing": []}'):
        verdict.write_text(broken)
        assert missing_here(verdict) == unknown
    monkeypatch.setattr(ganesha, "library_of", lambda: None)
    assert missing_here(verdict) == ()


def test_a_library_is_found_by_its_name_of_this_version(tmp_path: Path) -> None:
    assert library_of(tmp_path) is None
    place = tmp_path / "usr/lib/x86_64-linux-gnu"
    place.mkdir(parents=True)
    (place / "libganesha_nfsd.so.4.3").write_bytes(b"")
    (place / "libganesha_nfsd.so.4").symlink_to("libganesha_nfsd.so.4.3")
    assert library_of(tmp_path) == place / "libganesha_nfsd.so.4.3"


def test_old_ones_are_not_asked_for_what_they_read_wrong() -> None:
    for name, minors, options in (
        ("libganesha_nfsd.so.6.5", "1,2", ""),
        ("libganesha_nfsd.so.10.1", "1,2", "Blocking_Locks = false;"),
        ("libganesha_nfsd.so.4.3", "1", ""),
        ("libganesha_nfsd.so", "1", ""),
        ("libganesha_nfsd.so.next", "1", ""),
    ):
        library = Path("/usr/lib/ganesha") / name
        assert (minor_versions(library), lock_options(library)) == (minors, options)
    assert (minor_versions(None), lock_options(None)) == ("1", "")


# --- what a machine may mount -------------------------------------------------------------


def wish(name: str, path: str, *, read_only: bool = False) -> MountWish:
    return MountWish(name, path, read_only, 2**30)


def test_what_may_only_be_read_has_a_server_of_its_own() -> None:
    share = new_share(
        "org",
        (
            wish("a", "/workspace/a", read_only=True),
            wish("b", "/workspace/b"),
            wish("c", "/workspace/c", read_only=True),
            wish("c", "/workspace/d"),
        ),
    )
    writing, reading = share.parts
    assert (set(writing.mounts), set(reading.mounts)) == ({"b", "c"}, {"a"})
    assert (writing.port, reading.port) == (share.port, share.port + 1)
    # One operation for each change of server, in the order asked for.
    asked = [(one.port, [point.path for point in one.mounts]) for one in share.operations]
    assert asked == [
        (share.port + 1, ["/workspace/a"]),
        (share.port, ["/workspace/b", "/workspace/c", "/workspace/d"]),
    ]
    # The second keeps its port when the first has nothing to export any more.
    left = replace(share, mounts=share.mounts[:1])
    assert [one.port for one in left.parts] == [share.port + 1]
    assert [one.port for one in left.operations] == [share.port + 1]
    assert share.port + 1 < 32_768  # below what the kernel gives to other connections
    # Names that a client tells servers by, and the access of each.
    one, other = (
        configuration(part, list(part.mounts), library=None) for part in (writing, reading)
    )
    assert (
        one.split("Server_Owner")[1].split(";")[0] != other.split("Server_Owner")[1].split(";")[0]
    )
    assert ("Access_Type = RW" in one, "Access_Type = RW" in other) == (True, False)


def test_a_machine_of_before_has_one_server_for_all() -> None:
    mounts = (wish("a", "/workspace/a", read_only=True), wish("b", "/workspace/b"))
    (part,) = Share("org", 30_000, "client", mounts).parts
    assert (part.port, set(part.mounts)) == (30_000, {"a", "b"})
    told = configuration(part, ["a", "b"], library=None)
    assert told.index("Access_Type = RW") < told.index("Access_Type = RO")


TRY = """
import ctypes, os, runpy, sys
reads = runpy.run_path(sys.argv[1])
place = os.open(".", os.O_RDONLY)
handle = ctypes.create_string_buffer(256)
ctypes.memmove(handle, (128).to_bytes(4, "little"), 4)
libc = ctypes.CDLL(None, use_errno=True)
mount = ctypes.c_int()
assert libc.name_to_handle_at(place, b"file", handle, ctypes.byref(mount), 0) == 0
reads["install"]()
for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_PATH):
    found = libc.open_by_handle_at(place, handle, flags)
    print("open" if found >= 0 else os.strerror(ctypes.get_errno()))
open("other", "w").close()
"""


@pytest.mark.root
def test_a_server_for_reading_opens_nothing_by_handle_for_writing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    done = subprocess.run(
        [sys.executable, "-c", TRY, only_reads.__file__],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    refused = os.strerror(13)
    assert done.stdout.split("\n") == ["open", refused, refused, "open", ""], done.stderr
    assert ctypes.sizeof(ctypes.c_void_p) == 8
