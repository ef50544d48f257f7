"""A registry of container images in a network namespace of its own, as tests want it to behave.

    python -m tests.support.registry FOLDER ADDRESS PORT    serves FOLDER/<repository>/…

A repository is the files of an OCI layout (`oci_layout`). Its name says how it behaves:
`liar` sends blobs that do not match their digest, `busy` answers 429 at first, `elsewhere`
redirects to where no machine may go, `moves` has another manifest each time its tag is asked for,
and `closed` asks for a password.
"""

import json
import shutil
import ssl
import subprocess
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.images import ADDRESS, trusted
from tests.support.lab import ip

NETNS = "syd-test-registry"
HERE, PORT = "10.213.77.1", 5000
NETWORK = "10.213.77.0/30"
_BUSY = 3
USER, PASSWORD = "somebody", "a-password-of-theirs"
_AUTHORIZATION = "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode()
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="registry"'}
_asked: Counter[str] = Counter()


@contextmanager
def registry(folder: Path) -> Iterator[None]:
    """Serve the repositories in a folder, with the certificate that templates of tests trust."""
    for name in ("certificate.pem", "key.pem"):
        shutil.copy(trusted().with_name(name), folder)
    subprocess.run(["ip", "netns", "del", NETNS], capture_output=True, check=False)
    ip("netns", "add", NETNS)
    process = None
    try:
        ip("link", "add", "regtest0", "type", "veth", "peer", "name", "eth0", "netns", NETNS)
        ip("address", "add", f"{HERE}/30", "dev", "regtest0")
        ip("link", "set", "regtest0", "up")
        ip("-n", NETNS, "address", "add", f"{ADDRESS}/30", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", NETNS, "link", "set", device, "up")
        ip("-n", NETNS, "route", "add", "default", "via", HERE)
        process = subprocess.Popen(
            ["ip", "netns", "exec", NETNS, sys.executable, "-m", "tests.support.registry",
             folder, ADDRESS, str(PORT)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()
        ip("netns", "del", NETNS)


def put(folder: Path, name: str, files: Mapping[str, bytes]) -> str:
    """Add a repository with the files of an OCI layout, and return the name of its image."""
    for path, data in files.items():
        place = folder / name / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return f"{ADDRESS}:{PORT}/{name}:1"


class _Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_GET(self) -> None:
        if self.path == "/v2/":
            # As registries do that have repositories of both kinds: whoever has a password for
            # this host is told to send it.
            self._answer(401, b"{}", **_CHALLENGE)
            return
        _, _, name, kind, what = self.path.split("/", 4)
        _asked[name] += 1
        if name == "closed" and self.headers.get("Authorization") != _AUTHORIZATION:
            self._answer(401, b"{}", **_CHALLENGE)
            return
        if name == "busy" and _asked[name] <= _BUSY:
            self._answer(429, b"", **{"Retry-After": "1"})
        elif name == "elsewhere" and kind == "blobs":
            self._answer(307, b"", Location="http://169.254.169.254/latest/meta-data/")
        elif kind == "blobs":
            data = self._blob(name, what)
            self._answer(200, bytes(len(data)) if name == "liar" else data)
        else:
            self._manifest(name, what)

    do_HEAD = do_GET  # noqa: N815 - the library's names

    def _blob(self, name: str, digest: str) -> bytes:
        path = self.folder / name / "blobs" / digest.replace(":", "/")
        return path.read_bytes() if path.is_file() else b""

    def _manifest(self, name: str, what: str) -> None:
        index = self.folder / name / "index.json"
        if not index.exists():
            self._answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "unknown"}]}')
            return
        manifests = json.loads(index.read_bytes())["manifests"]
        number = _asked[name] % len(manifests) if name == "moves" else 0
        digest = what if ":" in what else manifests[number]["digest"]
        self._answer(
            200,
            self._blob(name, digest),
            **{
                "Content-Type": "application/vnd.oci.image.manifest.v1+json",
                "Docker-Content-Digest": digest,
            },
        )

    def _answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def main() -> None:
    """Serve until killed."""
    folder, address, port = sys.argv[1:]
    _Registry.folder = Path(folder)
    server = ThreadingHTTPServer((address, int(port)), _Registry)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(folder) / "certificate.pem", Path(folder) / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
