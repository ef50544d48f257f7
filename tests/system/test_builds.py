"""Template builds that run hostile code, or read what it left behind, harm nothing on the host."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.images import cached_settings, minimal_image
from tests.support.server import wait_until

from sandyard.server.app.wiring import images_of
from sandyard.server.core.errors import InternalError
from sandyard.server.node.images import inside
from sandyard.server.node.images.additions import pack_template
from sandyard.server.node.images.build import Builder, BuildOptions
from sandyard.server.node.images.confine import FIRST_ID, Bind, View
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.versions import Versions
from sandyard.server.node.images.workshop import workshop

pytestmark = [pytest.mark.root]

VIEWS = ["tree", "host"]
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class Work:
    """A folder of a build's, with a tree that holds busybox and little else."""

    def __init__(self, folder: Path, busybox: Path) -> None:
        self.folder = folder
        self.tree = folder / "root"
        for name in ("bin", "dev", "proc", "etc/profile.d", "tmp", "usr/local", "var/lib"):
            (self.tree / name).mkdir(parents=True)
        shutil.copy(busybox, self.tree / "bin/busybox")
        for name in ("sh", "ls", "cat", "mknod", "mount", "sleep", "setsid", "nc", "head"):
            (self.tree / "bin" / name).symlink_to("busybox")
        (folder / "view").mkdir()
        for path in (self.tree, *self.tree.rglob("*")):
            os.chown(path, FIRST_ID, FIRST_ID, follow_symlinks=False)

    def command(self, kind: str, word: str, *arguments: str, network: str = "none") -> list[str]:
        view = View(str(self.folder / "view"), network=network)
        if kind == "tree":
            view = replace(view, root=str(self.tree))
        else:
            view = replace(view, binds=(Bind(str(self.tree), "/tree", writable=True),))
        return [sys.executable, "-I", "-m", inside.__name__, view.to_json(), word, *arguments]

    def run(
        self, kind: str, word: str, *arguments: str, network: str = "none"
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(kind, word, *arguments, network=network), env={"PATH": PATH},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def sh(self, kind: str, script: str, *, network: str = "none") -> str:
        done = self.run(kind, "run", "/bin/sh", "-c", script, network=network)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shell that needs no library, from the tools of an image."""
    tools = tmp_path_factory.mktemp("tools") / "tree"
    image, _ = minimal_image().roots
    subprocess.run(
        ["fsck.erofs", f"--extract={tools}", str(image)], check=True, capture_output=True
    )
    return tools / "usr/bin/busybox"


@pytest.fixture
def work(tmp_path: Path, busybox: Path) -> Work:
    return Work(tmp_path / "work", busybox)


@pytest.mark.parametrize("kind", VIEWS)
def test_a_step_is_root_of_nothing_but_its_tree(work: Work, kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host's root")
    secret.chmod(0o600)
    name = socket.gethostname()
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    device = os.stat(tmp_path).st_dev
    out = work.sh(
        kind,
        f"""
        cat {secret}; cat /etc/shadow && echo read the accounts
        mknod /tmp/disk b {os.major(device)} {os.minor(device)} && echo made a device
        head -c 1 /tmp/disk && echo read the disk
        cat /proc/sys/kernel/core_pattern > /proc/sys/kernel/core_pattern && echo set it
        echo hijacked > /proc/sys/kernel/hostname
        mount -t tmpfs none /dev && echo mounted
        kill -0 {os.getpid()} && echo reached another process
        echo "processes:" $(ls -d /proc/[0-9]* | wc -l)
        """,
    )
    for bad in (
        "of the host's root",
        "read the accounts",
        "made a device",
        "read the disk",
        "set it",
        "another process",
    ):
        assert bad not in out, out
    # A mount is its own affair: it has a namespace for those.
    assert "mounted" in out
    assert int(out.partition("processes: ")[2].split()[0]) < 8
    assert socket.gethostname() == name
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern
    assert "/dev" not in [line.split()[4] for line in _mounts() if " - tmpfs none " in line]


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


@pytest.mark.parametrize("kind", VIEWS)
def test_a_step_writes_to_no_file_of_the_hosts(work: Work, kind: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    places = ["/usr", "/etc", "/var/tmp", "/tmp", "/run", "/root", "/dev/shm", str(tmp_path)]
    name = f"by-a-build-{os.getpid()}"
    work.sh(kind, "; ".join(f"echo x >{place}/{name}" for place in places))
    assert [place for place in places if Path(place, name).exists()] == []
    # What was mounted to get there is gone as well.
    assert not [line for line in _mounts() if str(work.folder) in line]
    assert (work.tree / "tmp" / name).exists() == (kind == "tree")


@pytest.mark.parametrize("kind", VIEWS)
def test_a_step_does_not_reach_the_hosts_loopback(work: Work, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # 10.0.2.2 is how slirp4netns would name the host.
        script = f"nc -w 3 127.0.0.1 {port} </dev/null; nc -w 3 10.0.2.2 {port} </dev/null"
        if kind == "host":
            script = f"exec 3<>/dev/tcp/127.0.0.1/{port}; exec 4<>/dev/tcp/10.0.2.2/{port}"
            done = work.run(kind, "run", "/bin/bash", "-c", script, network="own")
            assert done.returncode != 0
        else:
            work.sh(kind, script, network="own")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
        # Only the namespace keeps it away.
        done = work.run("host", "run", "/bin/bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}",
                        network="host")  # fmt: skip
        assert done.returncode == 0, done.stderr
        server.settimeout(10)
        server.accept()[0].close()
    # It is a network, and its own.
    links = work.sh(kind, "cat /proc/net/dev", network="own")
    assert "tap0:" in links
    assert {line.split(":")[0].strip() for line in links.splitlines() if ":" in line} == {
        "lo",
        "tap0",
    }


@pytest.mark.parametrize("kind", VIEWS)
def test_what_a_step_leaves_running_ends_with_it(work: Work, kind: str) -> None:
    started = time.monotonic()
    marker = 4_000_000 + os.getpid()
    work.sh(kind, f"setsid sleep {marker} </dev/null >/dev/null 2>&1 & sleep 0.2", network="own")
    assert time.monotonic() - started < 60
    assert _running(str(marker)) == []
    assert _running(str(work.folder)) == []


@pytest.mark.parametrize("kind", VIEWS)
def test_a_killed_build_leaves_nothing_running(work: Work, kind: str) -> None:
    marker = str(4_000_000 + os.getpid())
    command = work.command(kind, "run", "/bin/sh", "-c", f"sleep {marker}", network="own")
    others = set(_running("slirp4netns"))  # templates may be built meanwhile
    process = subprocess.Popen(command, env={"PATH": PATH}, start_new_session=True)
    try:
        runs = f"sleep {marker}"
        wait_until(lambda: any(_line(one) == runs for one in _running(runs)), what="it runs")
        children = set(_running("slirp4netns")) - others
        assert children
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: _running(marker) == [], what="its processes have ended")
    wait_until(lambda: not set(_running("slirp4netns")) & children, what="its network too")


def test_a_step_ends_with_its_builder(work: Work) -> None:
    """However that ends: nobody is left who would enforce the step's limit."""
    marker = str(4_000_000 + os.getpid())
    command = work.command("tree", "run", "/bin/sh", "-c", f"sleep {marker}")
    builder = "import subprocess, sys; subprocess.run(sys.argv[1:], start_new_session=True)"
    process = subprocess.Popen([sys.executable, "-c", builder, *command], env={"PATH": PATH})
    try:
        runs = f"sleep {marker}"
        wait_until(lambda: any(_line(one) == runs for one in _running(runs)), what="it runs")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: _running(marker) == [], what="its processes have ended")


@pytest.mark.parametrize("network", ["none", "own", "host"])
def test_a_step_leaves_the_hosts_network_namespaces_alone(work: Work, network: str) -> None:
    """Their mounts are shared, and unmounting them in another namespace would unmount them here."""
    name = f"syt-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        assert "lo" in work.sh("host", "cat /proc/net/dev", network=network)
        subprocess.run(["ip", "netns", "exec", name, "true"], check=True)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of calls are its")
def test_a_step_finds_no_key_of_the_hosts_root(work: Work) -> None:
    libc = "import ctypes, subprocess, sys; call = ctypes.CDLL(None).syscall; "
    search = f"{libc} print('found', call(250, 10, -3, b'user', b'secret', 0))"
    # In a session of its own with one key: keyctl(JOIN_SESSION_KEYRING), add_key.
    host = (
        f"{libc} call(250, 1, None); call(248, b'user', b'secret', b'of root', 7, -3); "
        "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    )
    found = {}
    for where, command in (
        ("here", ["/usr/bin/python3", "-c", search]),
        ("there", work.command("host", "run", "/usr/bin/python3", "-c", search)),
    ):
        done = subprocess.run(
            [sys.executable, "-c", host, *command], env={"PATH": PATH}, capture_output=True,
            text=True, check=True, timeout=60,
        )  # fmt: skip
        found[where] = int(done.stdout.split()[-1])
    if found["here"] < 0:
        pytest.skip("this kernel keeps no keys")
    assert found["there"] == -1


def test_a_tree_of_any_depth_is_removed(tmp_path: Path) -> None:
    with workshop(tmp_path, ".building-") as made:
        deep = os.open(made, os.O_RDONLY)
        for _ in range(3000):
            os.mkdir("d", dir_fd=deep)
            inner = os.open("d", os.O_RDONLY, dir_fd=deep)
            os.close(deep)
            deep = inner
        os.close(deep)
    assert list(tmp_path.iterdir()) == []
    with workshop(tmp_path, ".building-"):
        pass


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def _running(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


FILES = ["etc/machine-id", "etc/hostname", "etc/resolv.conf", "etc/environment"]
FOLDERS = [
    "etc/profile.d", "etc", "var", "var/log", "usr/local/sbin", "usr/local", "usr/lib",
    "usr/lib/sandyard", "usr/lib/modules", "workspace", "home/user", "home/user/.local",
    "usr/local/share", "usr",
]  # fmt: skip


@pytest.mark.parametrize(
    ("link", "leads_to"),
    [*((one, to) for one in FILES for to in ("folder/file", "not-there")),
     *((one, "folder") for one in FOLDERS)],
)  # fmt: skip
def test_links_in_a_tree_do_not_lead_out_of_it(
    work: Work, tmp_path: Path, link: str, leads_to: str
) -> None:
    canary = tmp_path / "canary"
    (canary / "folder/log").mkdir(parents=True)
    for name in ("folder/file", "folder/a.log", "folder/log/a.log", "folder/hostname"):
        (canary / name).write_text("untouched")
    for path in (canary, *canary.rglob("*")):
        path.chmod(0o777)
    before = {path: path.lstat().st_mtime_ns for path in canary.rglob("*")}
    (work.tree / "home/user").mkdir(parents=True)
    planted = work.tree / link
    if planted.is_dir():
        shutil.rmtree(planted)
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.symlink_to(canary / leads_to)
    for path in (work.tree, *work.tree.rglob("*")):
        os.chown(path, FIRST_ID, FIRST_ID, follow_symlinks=False)
    archive = tmp_path / "guest.tar"
    pack_template(archive, start="#!/bin/sh\n", files={}, certificates=["one"], modules=None)
    done = work.run("tree", "finish", str(archive), "own-kernel", "trust")
    # It may refuse such a tree, in a line.
    assert done.returncode == 0 or len(done.stderr.splitlines()) == 1, done.stderr
    assert {path: path.lstat().st_mtime_ns for path in canary.rglob("*")} == before
    assert all(path.stat().st_uid == 0 for path in before)
    if link in FILES:
        assert done.returncode == 0, done.stderr
        assert not planted.is_symlink()


async def test_a_hostile_build_ends_in_an_error_and_takes_nothing_from_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host's root")
    monkeypatch.setenv("OPERATORS_SECRET", "sk_of_the_operator")
    settings = cached_settings(tmp_path)
    steps = (
        "env; cat /proc/self/environ /proc/1/environ || true",
        f"ln -sf {secret} /etc/machine-id; ln -sf {secret} /etc/hostname",
        f"rm -r /usr/local/sbin; ln -s {tmp_path} /usr/local/sbin",
        f"for one in /boot/vmlinuz-*; do ln -sf {secret} $one; done",
    )
    minimal = images_of(settings).definitions["base-minimal"]
    images = Images(
        definitions={"hostile": replace(minimal, slug="hostile", steps=steps, digest="hostile")},
        images_dir=tmp_path / "images",
        templates_dir=tmp_path / "templates",
        versions=Versions(tmp_path / "versions"),
    )
    before = sorted(tmp_path.iterdir())
    builder = Builder(
        images, BuildOptions(cache_dir=tmp_path / "cache", logs_dir=tmp_path / "builds")
    )
    with pytest.raises(InternalError, match="cannot finish the step"):
        await builder.build("hostile", progress=lambda _: None)
    log = (tmp_path / "builds/hostile.log").read_text()
    assert "PATH=" in log
    assert "sk_of_the_operator" not in log
    assert secret.read_text() == "of the host's root"
    assert sorted(set(tmp_path.iterdir()) - set(before)) == [
        tmp_path / name for name in ("builds", "cache", "images", "templates")
    ]
    assert list((tmp_path / "images").iterdir()) == []
    assert not [line for line in _mounts() if str(tmp_path) in line]
