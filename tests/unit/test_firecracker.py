"""Firecracker without a machine: its API's table, and fetching its release."""

import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sandyard.server.app import firecracker as release
from sandyard.server.app.settings import Settings
from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.drivers.firecracker import schema
from sandyard.server.drivers.firecracker.api import limiter


@pytest.mark.parametrize(
    ("call", "body", "match"),
    [
        (("PUT", "/machine-config"), {"vcpu_count": 2}, "lacks mem_size_mib"),
        (("PUT", "/machine-config"), {"vcpu_count": 33, "mem_size_mib": 1}, "vcpu_count"),
        (("PUT", "/machine-config"), {"vcpu_count": True, "mem_size_mib": 1}, "vcpu_count"),
        (("PUT", "/boot-source"), {"kernel_image_path": "/k", "kernel": "/k"}, "has kernel"),
        (("PATCH", "/vm"), {"state": "Stopped"}, "state"),
        (("GET", "/"), {}, "should have none"),
        (("PUT", "/entropy"), None, "no object"),
        (
            ("PUT", "/drives/{id}"),
            {"drive_id": "a", "is_root_device": False, "rate_limiter": {"bandwidth": {"size": 1}}},
            "lacks refill_time",
        ),
        (
            ("PUT", "/snapshot/load"),
            {"snapshot_path": "/s", "network_overrides": [{"iface_id": "net"}]},
            "lacks host_dev_name",
        ),
    ],
)
def test_a_request_that_is_not_as_described_is_not_sent(
    call: tuple[str, str], body: object, match: str
) -> None:
    with pytest.raises(InternalError, match=match):
        schema.check("it", body, schema.CALLS[call].takes)


def test_a_limiter_is_as_described() -> None:
    assert limiter(0) is None
    found = limiter(3)
    assert found == {"bandwidth": {"size": 3 * 2**20, "refill_time": 1000}}
    schema.check(
        "it",
        {"drive_id": "a", "is_root_device": False, "rate_limiter": found},
        schema.CALLS["PUT", "/drives/{id}"].takes,
    )


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""
    folder = tmp_path / "releases"
    (folder / "v1.12.1").mkdir(parents=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        server.daemon_threads = False  # so that closing the server waits for its last request
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def archive(programs: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as opened:
        for name, data in programs.items():
            member = tarfile.TarInfo(f"release-v1.12.1-x86_64/{name}-v1.12.1-x86_64")
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return made.getvalue()


@pytest.mark.parametrize(
    ("served", "match"),
    [
        (None, "404"),
        (b"no archive", "cannot use what was downloaded"),
        (archive({"firecracker": b"f"}), "cannot use what was downloaded"),
        (archive({"firecracker": b"f", "jailer": b"j"}), "checksum"),
    ],
)
def test_what_is_not_the_release_is_not_installed(
    tmp_path: Path, releases: tuple[Path, str], served: bytes | None, match: str
) -> None:
    folder, address = releases
    if served is not None:
        (folder / "v1.12.1/firecracker-v1.12.1-x86_64.tgz").write_bytes(served)
    with pytest.raises(UnavailableError, match=match):
        release.fetch(Settings(home=tmp_path), progress=lambda _: None, source=address)
    assert not release.bin_dir(Settings(home=tmp_path)).exists()


def test_the_release_is_installed(
    tmp_path: Path, releases: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:

    programs = {"firecracker": b"#!/bin/sh\n", "jailer": b"#!/bin/true\n"}
    monkeypatch.setattr(
        release, "DIGESTS", {name: sha256(data).hexdigest() for name, data in programs.items()}
    )
    folder, address = releases
    (folder / "v1.12.1/firecracker-v1.12.1-x86_64.tgz").write_bytes(archive(programs))
    settings = Settings(home=tmp_path)
    found = release.fetch(settings, progress=lambda _: None, source=address)
    for name, data in programs.items():
        assert (found / name).read_bytes() == data
        assert (found / name).stat().st_mode & 0o777 == 0o755
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release.program(settings, "jailer", None) == str(found / "jailer")
    assert release.program(settings, "jailer", "/my/jailer") == "/my/jailer"
