"""What is saved is known again: whole, cut off, altered, and sealed by an earlier version."""

import hmac
import json
import os
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.errors import DamagedError
from sandyard.server.drivers.sparse import copy_sparse, digest_sparse, mac_sparse
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.saved import About, check, load, seal

KEY = b"k" * 32
ABOUT = About("paused", "t", "i", "o", 1, 512, 1024, "qemu-tcg", "10", "host", "token")


def state(folder: Path) -> Path:
    made = folder / "saved"
    made.mkdir()
    (made / "device").write_bytes(b"device")
    (made / "pages").write_bytes(os.urandom(3 * 2**20 + 5))
    return made


def test_a_state_that_is_whole_is_accepted(tmp_path: Path) -> None:
    sealed = seal(state(tmp_path), ABOUT, key=KEY)
    found = load(sealed.folder, key=KEY)
    assert found.about.token == "token"
    check(found, whole=True)
    assert "kkkk" not in repr(found)


@pytest.mark.parametrize("place", [0, 2**20, 3 * 2**20 + 4])
def test_one_byte_that_was_altered_is_found(tmp_path: Path, place: int) -> None:
    sealed = seal(state(tmp_path), ABOUT, key=KEY)
    pages = sealed.folder / "pages"
    times = pages.stat()
    with pages.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(pages, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DamagedError, match="pages was altered"):
        check(load(sealed.folder, key=KEY), whole=True)


def test_what_is_sealed_is_on_the_disk_before_its_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = state(tmp_path)
    with (folder / "memory").open("wb") as file:  # with a hole, and digested once it is synced
        file.write(b"m" * 4096)
        file.truncate(2**20)
    done: list[str] = []
    sync = os.fsync

    def synced(descriptor: int) -> None:
        sync(descriptor)
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def digested(path: Path, key: bytes) -> str:
        assert path.name != "memory" or "memory" in done
        return mac_sparse(path, key)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(saving, "mac_sparse", digested)
    seal(folder, ABOUT, key=KEY)
    assert sorted(done[:3]) == ["device", "memory", "pages"]
    assert done[3:] == ["manifest.json", "saved"]


def test_what_cannot_be_synced_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = state(tmp_path)

    def is_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", is_full)
    with pytest.raises(OSError, match="No space"):
        seal(folder, ABOUT, key=KEY)
    assert not (folder / "manifest.json").exists()


def test_a_state_sealed_with_another_key_is_refused(tmp_path: Path) -> None:
    sealed = seal(state(tmp_path), ABOUT, key=KEY)
    with pytest.raises(DamagedError, match="manifest"):
        load(sealed.folder, key=b"o" * 32)


def test_each_file_is_sealed_by_a_key_of_its_own(tmp_path: Path) -> None:
    folder = state(tmp_path)
    (folder / "other").write_bytes((folder / "device").read_bytes())
    files = seal(folder, ABOUT, key=KEY).files
    assert files["other"]["mac"] != files["device"]["mac"]


@pytest.mark.parametrize("harm", [False, True])
def test_a_state_of_the_first_format_is_still_good(tmp_path: Path, harm: bool) -> None:
    """As an earlier version wrote it: digests without a key, in a manifest signed as now."""
    folder = state(tmp_path)
    files = {
        path.name: {
            "size": path.stat().st_size, "time": path.stat().st_mtime_ns,
            "inode": path.stat().st_ino, "sha256": digest_sparse(path),
        }
        for path in sorted(folder.iterdir())
    }  # fmt: skip
    content = {"format": 1, "about": vars(ABOUT), "files": files}
    signed = b"sandyard saved machine\0" + json.dumps(content, sort_keys=True).encode()
    signature = hmac.new(KEY, signed, "sha256").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "signature": signature}))
    found = load(folder, key=KEY)
    if harm:
        (folder / "pages").write_bytes(bytes(3 * 2**20 + 5))
        with pytest.raises(DamagedError, match="altered"):
            check(found, whole=True)
    else:
        check(found, whole=True)


@given(st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=9000)), max_size=5))
def test_a_copy_has_the_same_mac_and_what_differs_another(
    pieces: list[tuple[int, bytes]],
) -> None:
    with tempfile.TemporaryDirectory() as home:
        one, copy = Path(home) / "one", Path(home) / "copy"
        with one.open("wb") as file:
            file.truncate(45 * 65536)
            for block, data in pieces:
                file.seek(block * 65536)
                file.write(data)
        copy_sparse(one, copy)
        key = sha256(home.encode()).digest()[:16]
        assert mac_sparse(one, key) == mac_sparse(copy, key)
        assert digest_sparse(one) == digest_sparse(copy)
        with copy.open("r+b") as file:
            file.seek(7)
            first = file.read(1)
            file.seek(7)
            file.write(bytes([first[0] ^ 0x80]))
        assert mac_sparse(one, key) != mac_sparse(copy, key)
