"""Patches for NFS-Ganesha's library, for builds that are known byte by byte.

A server loads a patched copy; the host's own file is not touched. A build is recognized by the
SHA-256 of its library, and each has the digest of its patched copy recorded beside it, so nothing
is ever changed by guessing. Any other build runs as it is. What will not work is found out by a
test when the node starts (`self_test.py`); until then the digest tells.

What is patched, and why:

**Locks of other machines.** Each machine has a server of its own, so a lock that another machine
holds is found by the host's kernel, and Ganesha does not know its owner. It answers with the owner
"ganesha_unknown_owner", 21 bytes (`Process_nfs4_conflict` in its SAL/nfs4_owner.c). Linux clients
have room for 20 (`lock_owner_id_maxsz` in fs/nfs/nfs4xdr.c), cannot read the answer, and fail with
EIO. The patch makes the recorded length 20. No released version has this fixed (up to 15.2).

**Waiting for a lock.** From 6.5 on, a request that waits for a lock is queued in the server, which
looks again after twice the lease time and ignores the client's own attempts until then
(`state_lock` in SAL/state_lock.c). The patch treats such a request as one that does not wait, as
4.3 does, so each attempt of the client counts. From 9 on the option `Blocking_Locks` does that.

**Files that are opened again.** Versions 6.4 and 6.5 check a second OPEN of a file by the mode of
the file, for all that is open already as well (`open4_ex` in Protocols/NFS/nfs4_op_open.c;
nfs-ganesha's issue 1219). A file that is made read-only while it is open for writing, as every
pack of `git clone` is, can then be opened for reading by root alone. The patch checks only if the
client asks for something that it does not have open. Fixed from 7 on.

How builds were read: the offsets are those of the instructions and data named above in the
disassembly of each distribution's package.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

_PLACES = ("usr/lib/ganesha", "usr/lib64/ganesha", "usr/lib/*-linux-gnu", "usr/lib", "usr/lib64")
_READS_WELL = 6
_LOCKS_BY_OPTION = 9
_LOCKS_WAIT_IN_SERVER = ("6.5", "6.6")
_REFUSES_AGAIN = ("6.4", "6.5")


class Feature(StrEnum):
    """A feature of mounted workspaces that some builds lack, described for an operator."""

    LOCKS = "a file lock that another sandbox holds fails with an I/O error"
    WAITING = "a file lock that another sandbox releases is granted up to a minute later"
    REOPENED = "git clone works for root only"


@dataclass(frozen=True)
class Build:
    """One build of the library: what package it is from, the digest of its patched copy, the
    changes (offset, bytes before, bytes after), and what stays missing."""

    package: str
    digest: str
    changes: tuple[tuple[int, str, str], ...]
    missing: tuple[Feature, ...] = ()


# By the digest of the library as it is installed. All are for x86-64.
BUILDS: Mapping[str, Build] = {
    "5e9ccaf558154c3f3c9994c5d76093a4c4909fed81031f094c6c2ea7d5b3b003": Build(
        "Debian 12, 4.3-2",
        "5a9788037f58ef22d1388e4a9603a0b57893bbdc1cc62a026e59d18c1fb12efe",
        ((0x1C0404, "15000000", "14000000"),),
    ),
    "e53cca3b4d0906e06fbd99072d37a4046c8a368be1ce5b27926bd0d870cdf40e": Build(
        "Debian 12 backports, 5.9-5~bpo12+1",
        "281324404a2de6d1daf47d9c087e7c1ed4b0a07243e3f6e0585f9ac989324857",
        ((0x1D28A4, "15000000", "14000000"),),
    ),
    "8ad3812f9ebbc419e5915a70bc77347dbe8ddf442eeae4fbc7f6c9a4240f5e67": Build(
        "Debian 13, 6.5-5",
        "b80f20919f3e0b8faba9712ac3b1f2f00e2b51544c532436ef613d88486bd266",
        (
            (0x1F1AC4, "15000000", "14000000"),
            (
                0x10560D,
                "0fb7542430488bbc24a8000000b901000000488bb424a00000004409d20fb7d2",
                "0fb7542430488bbc24a8000000488bb424a000000089d14409d26639d10f95c1",
            ),
            (0xFF86A, "01", "00"),
            (0xFF812, "01", "00"),
        ),
    ),
    "f84a3e4b64aa84e8df738a421fce68057d91240b710c4423721331738700cec7": Build(
        "Debian 13 backports, 9.14-1~bpo13+1",
        "d51375bf212b4d2734a41d24241229135e6a96fdc3612df7c8419880d9d92753",
        ((0x2702A4, "15000000", "14000000"),),
    ),
    "b42e7d58ddb52b82eb06f5d3bebd3e6e41c52c2f13724758e45eae2e8e19cfeb": Build(
        "Debian forky, 9.14-2",
        "ea5282c773be96f2cf01d5d6b739ebca78cf94c5d214c8956a66009759ecfab1",
        ((0x266FE4, "15000000", "14000000"),),
    ),
    "08c6a3e358689d4715c2ab8dd86b5dbc3683e8b287a6d1480578877fa5aa0f47": Build(
        "Debian sid, 15.2-3",
        "c57ae91c93875d0c57543c366c2e161a619950339016bfc2ae7bcae7e220565e",
        ((0x39F3E4, "15000000", "14000000"),),
    ),
    "bcefb8576a661988939ffeed7997067f4312bbc52450f8eb77dfdc4024c94e36": Build(
        "Ubuntu 22.04, 3.5-1build1",
        "051687a03d78751a263c1c771f40812b0d1c9125a994977bd4944e1aaad60cec",
        ((0x1A12E4, "15000000", "14000000"),),
    ),
    "fc7c1272f7d6f8dee13da7d95fc4185f874865cb42340b207db68832e6b33085": Build(
        "Ubuntu 24.04, 4.3-8ubuntu1",
        "d85c9fbb00e2a355b1bc5b63796b57a8a5b5af1b99df9a159550e016429339bb",
        ((0x19CC24, "15000000", "14000000"),),
    ),
    "46bc659c02e838c740664bd12d2145bc755187cd96a15a6fb3147a3678a85e48": Build(
        "Ubuntu 25.04, 6.5-3",
        "77929474712aba03845554a0589010c9b0e61cf98b572342aac0cd32cd9a06cc",
        (
            (0x1C9A64, "15000000", "14000000"),
            (0xEB632, "01", "00"),
            (0xEB5DE, "01", "00"),
        ),
        missing=(Feature.REOPENED,),
    ),
    "d2d0bdeb68d30c727a9e418e165c5aa7207dac41f608fdae3c8c7309a43c7150": Build(
        "Ubuntu 25.10, 6.5-5",
        "7730c2c787605c9d5a3a272de75d47f2b7e91e8804ae11b017e8cd07583ea8ef",
        (
            (0x1C9A64, "15000000", "14000000"),
            (0xEB5B2, "01", "00"),
            (0xEB55E, "01", "00"),
        ),
        missing=(Feature.REOPENED,),
    ),
    "0a42e13d0422fe094375af812b597b36033651d015e7cceb530ba9c11ad85537": Build(
        "Ubuntu 26.04, 6.5-8",
        "40d38f6511d4c0568454ef608418c1f4282a21e36445dd67956fc5c260840462",
        (
            (0x1CCA64, "15000000", "14000000"),
            (0xFE71A, "01", "00"),
            (0xFE6CA, "01", "00"),
        ),
        missing=(Feature.REOPENED,),
    ),
}


def library_of(root: Path = Path("/")) -> Path | None:
    """Return where Ganesha's library is on a host; None if it is not installed."""
    found = (one for place in _PLACES for one in sorted(root.glob(f"{place}/libganesha_nfsd.so.*")))
    return next((one for one in found if one.is_file() and not one.is_symlink()), None)


def version_of(library: Path | None) -> str:
    """Return the version in a library's name, such as 6.5; an empty string if there is none."""
    return "" if library is None else library.name.partition(".so.")[2]


def minor_versions(library: Path | None) -> str:
    """Return which minor versions of NFSv4 this library can be trusted with: "1,2" or "1".

    By NFSv4.2, Ganesha 4.3 reads zeros where data is (READ_PLUS; tried with Linux 6.12, which asks
    so). 6.5 does not.
    """
    return "1,2" if _major(version_of(library)) >= _READS_WELL else "1"


def lock_options(library: Path | None) -> str:
    """Return the options of the NFSv4 section that make clients wait for locks themselves."""
    is_known = _major(version_of(library)) >= _LOCKS_BY_OPTION
    return "Blocking_Locks = false;" if is_known else ""


def patched(library: bytes) -> bytes:
    """Return the patched library, or the library itself if its build is unknown."""
    build = BUILDS.get(sha256(library).hexdigest())
    if build is None:
        return library
    made = bytearray(library)
    for at, before, after in build.changes:
        old, new = bytes.fromhex(before), bytes.fromhex(after)
        assert len(old) == len(new)
        assert made[at : at + len(old)] == old
        made[at : at + len(new)] = new
    assert sha256(made).hexdigest() == build.digest
    return bytes(made)


def verdict_in(home: Path) -> Path:
    """Return the path of the file with the result of the self-test."""
    return home / "file-servers.json"


def note_verdict(verdict: Path, library: Path, missing: Sequence[Feature]) -> None:
    """Save the result of a self-test with this library."""
    found = library.stat()
    known = {"library": _digest_of(library, found.st_mtime_ns, found.st_size), "missing": missing}
    part = verdict.with_name(f"{verdict.name}.part")
    part.write_text(json.dumps(known))
    part.replace(verdict)


def missing_here(verdict: Path) -> Collection[Feature]:
    """Return the features that the installed library lacks; nothing if no library is installed.

    Uses the saved result of a self-test of this library in `verdict`, or else its digest.
    """
    library = library_of()
    if library is None:
        return ()
    found = library.stat()
    digest = _digest_of(library, found.st_mtime_ns, found.st_size)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(verdict.read_text())
        if known["library"] == digest:
            return tuple(Feature(one) for one in known["missing"])
    build = BUILDS.get(digest)
    return _missing_unpatched(version_of(library)) if build is None else build.missing


@lru_cache(maxsize=4)
def _digest_of(library: Path, _mtime_ns: int, _size: int) -> str:
    return sha256(library.read_bytes()).hexdigest()


def _missing_unpatched(version: str) -> tuple[Feature, ...]:
    missing = [Feature.LOCKS]
    if version in _LOCKS_WAIT_IN_SERVER:
        missing.append(Feature.WAITING)
    if version in _REFUSES_AGAIN:
        missing.append(Feature.REOPENED)
    return tuple(missing)


def _major(version: str) -> int:
    major = version.partition(".")[0]
    return int(major) if major.isdecimal() else 0
