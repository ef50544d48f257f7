"""Images of the kinds that people have, as sandboxes: every file is what its layers say."""

import io
import json
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.oci import oci_layout, tree
from tests.support.ports import free_port
from tests.support.server import NO_POOL, QEMU, RealServer, longer

pytestmark = [pytest.mark.machine, pytest.mark.long, pytest.mark.timeout(3600)]

_APP = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"by gunicorn"]
"""
_HELLO = r"""
#include <stdio.h>
#include <unistd.h>
int main(int count, char **words) {
    puts("by musl");
    fflush(stdout);
    return count > 1 ? 0 : pause();
}
"""
_PACKAGE = {"name": "app", "version": "1.0.0", "dependencies": {"of-mine": "file:./of-mine"}}
_DEPENDENCY = {"name": "of-mine", "version": "1.0.0", "main": "index.js"}
_FILES = {
    "app.py": _APP,
    "hello.c": _HELLO,
    "node/package.json": json.dumps(_PACKAGE),
    "node/of-mine/package.json": json.dumps(_DEPENDENCY),
    "node/of-mine/index.js": "module.exports = 'by npm'\n",
}
# Nothing is fetched but packages: what is not in them is of these files alone.
_MAKE = """
python3 -m venv --system-site-packages /app/venv
cd /app/node
npm install --package-lock-only --offline --no-audit --no-fund
npm ci --offline --no-audit --no-fund
musl-gcc -o /app/hello /app/hello.c
useradd --create-home web
"""
_PACKAGES = "python3,python3-venv,python3-gunicorn,nodejs,npm,gcc,libc6-dev,musl,musl-tools,g++"
# Lists the tree as `said_by` does. It is run by whatever Python there is.
_LIST = """
import json, os, stat, sys, zlib
found = {}
for folder, folders, files in os.walk(b"/"):
    for name in folders + files:
        path = os.path.join(folder, name)
        about = os.lstat(path)
        more = None
        if stat.S_ISLNK(about.st_mode):
            more = os.fsdecode(os.readlink(path))
        elif stat.S_ISREG(about.st_mode):
            more = 0
            with open(path, "rb") as file:
                while data := file.read(1 << 20):
                    more = zlib.crc32(data, more)
        kind = stat.S_IFMT(about.st_mode)
        mode = 0 if stat.S_ISLNK(about.st_mode) else stat.S_IMODE(about.st_mode)
        found[os.fsdecode(path[1:])] = [kind, mode, about.st_uid, about.st_gid, more]
    folders[:] = [one for one in folders if not os.path.ismount(os.path.join(folder, one))]
with open("/tmp/found", "w", errors="surrogateescape") as file:
    json.dump(found, file)
"""
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_OF_SANDBOXES = (
    "dev", "proc", "run", "sys", "tmp", "etc/hostname", "etc/hosts", "etc/machine-id",
    "etc/resolv.conf",
)  # fmt: skip
"""What every sandbox has of its own."""


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    made = RealServer(free_port(), **QEMU, **NO_POOL, SANDYARD_BUILDS__DISK_MIB="8192")
    try:
        made.run("template", "build", "builder", limit_s=1200)
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A layer with Debian, Python and Node.js, compilers, and an application of each."""
    folder = tmp_path_factory.mktemp("debian")
    for name, text in _FILES.items():
        place = folder / "app" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={_PACKAGES}",
         f"--customize-hook=copy-in {folder / 'app'} /",
         f"--customize-hook=chroot \"$1\" sh -ec '{_MAKE}'", "trixie", folder / "layer.tar"],
        check=True, capture_output=True, timeout=longer(900),
    )  # fmt: skip
    return (folder / "layer.tar").read_bytes()


def part_of(layer: bytes, is_wanted: Callable[[str], bool]) -> bytes:
    """Return what of a layer is wanted."""
    made = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(layer)) as whole,
        tarfile.open(fileobj=made, mode="w") as part,
    ):
        for member in whole:
            if is_wanted(member.name.removeprefix("./")):
                part.addfile(member, whole.extractfile(member) if member.isreg() else None)
    return made.getvalue()


def said_by(layers: list[bytes]) -> dict[str, list[Any]]:
    """Return what layers say of each path: type, mode, owner, group, and target or checksum."""
    kinds = {tarfile.DIRTYPE: 0o040000, tarfile.SYMTYPE: 0o120000, tarfile.REGTYPE: 0o100000}
    said: dict[str, list[Any]] = {}
    for one in layers:
        with tarfile.open(fileobj=io.BytesIO(one)) as opened:
            for member in opened:
                path = member.name.removeprefix("./").rstrip("/")
                if member.islnk():
                    said[path] = said[member.linkname.removeprefix("./")]
                elif member.type in kinds and path not in ("", "."):
                    more: str | int | None = member.linkname if member.issym() else None
                    if member.isreg():
                        file = opened.extractfile(member)
                        assert file is not None
                        more = zlib.crc32(file.read())
                    mode = 0 if member.issym() else member.mode
                    said[path] = [kinds[member.type], mode, member.uid, member.gid, more]
    return said


def built(server: RealServer, slug: str, layers: list[bytes], config: dict[str, Any]) -> str:
    """Build a template of an image, and return a sandbox of it."""
    image = tree(oci_layout(layers, config, compress="gzip"), mode=0o644)
    upload = server.client.post("/v1/templates/uploads", content=image, timeout=longer(120))
    assert upload.status_code == 201, upload.text
    body = {"slug": slug, "upload": upload.json()["data"]["uploadId"]}
    asked = server.client.post("/v1/templates", json=body)
    assert asked.status_code == 202, asked.text
    logs = server.run("template", "logs", slug, limit_s=longer(1200)).stdout
    build = server.client.get(f"/v1/templates/{slug}/builds").json()["data"][0]
    assert build["status"] == "ready", (build["error"], logs)
    return str(server.create(template=slug)["id"])


def differences(server: RealServer, box: str, layers: list[bytes]) -> dict[str, Any]:
    """Return what of a sandbox's tree is not what its layers say."""
    path = {"path": "/tmp/list.py"}
    files = f"/v1/sandboxes/{box}/files"
    assert server.client.put(files, params=path, content=_LIST.encode()).is_success
    asked = {"command": "python3 /tmp/list.py", "user": "root", "timeout": 900_000}
    done = server.client.post(f"/v1/sandboxes/{box}/exec", json=asked, timeout=longer(1000))
    assert done.json()["data"]["exitCode"] == 0, done.text
    found = json.loads(server.client.get(files, params={"path": "/tmp/found"}).content)
    return {
        path: (one, found.get(path))
        for path, one in said_by(layers).items()
        if found.get(path) != one and not path.startswith(_OF_SANDBOXES)
    }


def test_debian_with_a_virtual_environment_and_a_health_check(
    server: RealServer, debian: bytes
) -> None:
    layers = [debian, tree({"app/setting": b"of the second layer"}, mode=0o640)]
    check = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000').read())"
    serve = ["/app/venv/bin/python", "-m", "gunicorn", "-b", "127.0.0.1:8000", "app:app"]
    config = {
        "Cmd": serve, "User": "web", "WorkingDir": "/app",
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "GREETING=hello"],
        "Healthcheck": {"Test": ["CMD-SHELL", f'python3 -c "{check}"'], "Interval": 5 * 10**9},
    }  # fmt: skip
    box = built(server, "debian-app", layers, config)
    asked = (
        "id -un; pwd; echo $GREETING; cd node; node -e \"console.log(require('of-mine'))\"",
        f'python3 -c "{check}"',
        "/app/hello once",
    )
    said = server.execute(box, "; ".join(asked))
    assert said["stdout"] == "web\n/app\nhello\nby npm\nb'by gunicorn'\nby musl\n", said
    assert differences(server, box, layers) == {}
    server.delete(box)


def test_an_image_without_a_shell(server: RealServer, debian: bytes) -> None:
    folders = ("bin", "lib", "lib64", "usr", "usr/bin", "usr/lib", "etc", _LIBRARIES)
    kept = ("usr/bin/python3", "usr/lib/python3", "usr/lib64", "etc/passwd", "etc/group")

    def is_wanted(name: str) -> bool:
        folder, _, file = name.rstrip("/").rpartition("/")
        is_library = folder == _LIBRARIES and ".so" in file
        return name.rstrip("/") in folders or name.startswith(kept) or is_library

    layer = part_of(debian, is_wanted)
    check = "import urllib.request as u; u.urlopen('http://127.0.0.1:8000').read()"
    config = {
        "Entrypoint": ["/usr/bin/python3", "-m", "http.server", "8000"],
        "Healthcheck": {"Test": ["CMD", "/usr/bin/python3", "-c", check]},
    }
    box = built(server, "no-shell", [layer], config)
    assert server.execute(box, "python3 -c 'print(6 * 7)'")["stdout"] == "42\n"
    assert differences(server, box, [layer]) == {}
    server.delete(box)


def test_an_image_whose_programs_need_musl(server: RealServer, debian: bytes) -> None:
    kept = ("lib", "usr", "usr/lib", "app", "app/hello", "usr/lib/x86_64-linux-musl")
    layer = part_of(
        debian,
        lambda name: name.rstrip("/") in kept or "ld-musl" in name or "linux-musl/libc" in name,
    )
    box = built(server, "of-musl", [layer], {"Cmd": ["/app/hello"]})
    assert server.execute(box, "/app/hello once")["stdout"] == "by musl\n"
    names = "for one in /proc/[0-9]*/comm; do read -r name < $one && echo $name; done"
    assert "hello" in str(server.execute(box, names)["stdout"]).splitlines()
    server.delete(box)
