"""The default template as people use it: its user, its Python, its ends, its disks; and every
example of the first pages, as it is written there, under emulation."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.ports import free_port
from tests.support.server import QEMU, SANDYARD, RealServer, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.large]
LONG = pytest.mark.long

ROOT = Path(__file__).parents[2]
BUILD_LIMIT_S = 1200
WHEEL = """
import base64, hashlib, zipfile
files = {
    "greeting/__init__.py": "WORDS = 'hello from a wheel'\\n",
    "greeting-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: greeting\\nVersion: 1\\n",
    "greeting-1.dist-info/WHEEL":
        "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
}
with zipfile.ZipFile("/tmp/greeting-1-py3-none-any.whl", "w") as wheel:
    for name, text in files.items():
        wheel.writestr(name, text)
    wheel.writestr("greeting-1.dist-info/RECORD", "".join(f"{n},,\\n" for n in files))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    made = RealServer(
        free_port(),
        **QEMU,
        SANDYARD_POOL__FLOOR="1",
        SANDYARD_POOL__CEILING="1",
    )
    made.share_goldens("base-ubuntu")
    try:
        made.run("template", "build", "base-ubuntu", limit_s=BUILD_LIMIT_S)
        made.start()
        wait_until(lambda: bool(made.waiting()), limit_s=180, what="one waits")
        yield made
    finally:
        made.remove()


@pytest.fixture(autouse=True)
def _leaves_nothing(server: RealServer) -> Iterator[None]:
    yield
    for kind in ("sandboxes", "snapshots"):
        for one in server.client.get(f"/v1/{kind}").json()["data"]:
            server.client.delete(f"/v1/{kind}/{one['id']}")
    wait_until(lambda: server.machines() == set(), what="nothing is left")


@pytest.fixture
def box(server: RealServer) -> str:
    return str(server.create(template="base-ubuntu")["id"])


def said(server: RealServer, box: object, command: str, **body: object) -> str:
    """Return what a command printed that did well."""
    end = server.execute(box, command, **{"timeout": 600_000, **body})
    assert end["exitCode"] == 0, end
    return str(end["stdout"])


# --- what is in it --------------------------------------------------------------------------------


def test_an_ordinary_user_works_and_may_become_root(server: RealServer, box: str) -> None:
    told = said(
        server, box, "id -un; sudo -n id -un; pwd; touch mine; stat -c %U mine", user="user"
    )
    assert told.split() == ["user", "root", "/workspace", "user"]


def test_python_and_pip_work_for_root_and_for_the_user(server: RealServer, box: str) -> None:
    said(server, box, "python3 -", stdin=WHEEL)
    for user in ("root", "user"):
        line = (
            "pip install --quiet --no-index --force-reinstall /tmp/greeting-1-py3-none-any.whl && "
            "python -c 'import greeting, sys; print(greeting.WORDS, sys.prefix)'"
        )
        told = said(server, box, line, user=user)
        assert told == "hello from a wheel /opt/venv\n"
    assert said(server, box, "sudo -n which pip", user="user") == "/opt/venv/bin/pip\n"


GIT = """
set -e
cd ~
git init -q -b main origin
cd origin
git config --global user.email me@example.org
git config --global user.name me
head -c 300000 /dev/urandom >data
git add .
git commit -qm one
git clone -q ~/origin /workspace/clone
git clone -q --no-local ~/origin /workspace/packed  # as from elsewhere: it comes in a pack
cd /workspace/packed
git fsck --no-progress
echo two >two
git add .
git commit -qm two
git gc -q
git push -q origin HEAD:other
git log --format=%s
cmp data ../clone/data
findmnt -no FSTYPE /workspace
"""
NPM = """
set -e
mkdir own app
echo '{"name": "own", "version": "1.0.0"}' >own/package.json
echo 'module.exports = 42' >own/index.js
npm pack --silent ./own
cd app
npm install --silent --offline --no-audit --no-fund ../own-1.0.0.tgz
node -e 'console.log(require("own"))'
"""


def test_git_pip_and_npm_work_in_a_workspace(server: RealServer) -> None:
    work = server.client.post("/v1/workspaces", json={"name": "Work"}).json()["data"]["id"]
    mounts = [{"workspaceId": work, "path": "/workspace"}]
    box = str(server.create(template="base-ubuntu", mounts=mounts)["id"])
    assert said(server, box, GIT, user="user").split() == ["two", "one", "nfs4"]
    said(server, box, "python3 -", stdin=WHEEL)
    line = (
        "pip install --quiet --no-index --target site /tmp/greeting-1-py3-none-any.whl && "
        "PYTHONPATH=site python -c 'import greeting; print(greeting.WORDS)'"
    )
    told = said(server, box, line, user="user", cwd="/workspace")
    assert told == "hello from a wheel\n"
    told = said(server, box, NPM, user="user", cwd="/workspace")
    assert told.split() == ["own-1.0.0.tgz", "42"]
    server.delete(box)
    assert server.client.delete(f"/v1/workspaces/{work}").status_code == 200


def test_what_etc_environment_sets_is_in_every_process(server: RealServer, box: str) -> None:
    said(server, box, "echo 'OWN=\"from a file\"' >> /etc/environment")
    assert said(server, box, "echo $OWN") == "from a file\n"


def test_authorities_of_ones_own_are_trusted(server: RealServer, box: str) -> None:
    line = (
        "import ssl; c = ssl.create_default_context(); "
        "print(any(one['serialNumber'] == '1267' for one in c.get_ca_certs()))"
    )
    assert said(server, box, f'python3 -c "{line}"') == "True\n"
    told = said(server, box, "echo $NODE_EXTRA_CA_CERTS $PIP_CERT").split()
    assert told == ["/etc/ssl/certs/ca-certificates.crt"] * 2


def test_layers_of_containers_can_be_mounted_as_root_and_without(
    server: RealServer, box: str
) -> None:
    mount = (
        "cd {0} && mkdir -p l u w m && echo low > l/f && "
        "mount -t overlay o -olowerdir=l,upperdir=u,workdir=w m && echo high > m/f && cat m/f u/f"
    )
    for place in ("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers"):
        assert said(server, box, mount.format(place)) == "high\nhigh\n"
    own = mount.format("~/.local/share/containers")
    assert said(server, box, f"unshare -Urm sh -c '{own}'", user="user") == "high\nhigh\n"
    assert said(server, box, "cat /etc/subuid", user="user").startswith("user:")
    opens = ": <>/dev/net/tun && : <>/dev/fuse && echo open"
    assert said(server, box, opens, user="user") == "open\n"


# --- its ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["reboot", pytest.param("shutdown -r now", marks=LONG)])
def test_a_reboot_from_inside_is_a_restart(server: RealServer, box: str, word: str) -> None:
    said(server, box, "echo kept > file; echo lost > /dev/shm/memory; sync")
    server.client.post(
        f"/v1/sandboxes/{box}/exec", json={"command": f"sudo {word}", "user": "user"}
    )
    wait_until(
        lambda: (server.get(box)["statusReason"] or {}).get("code") == "restarted_from_disk",  # type: ignore[attr-defined]
        limit_s=120, what="it restarts",
    )  # fmt: skip
    assert said(server, box, "cat file; ls /dev/shm") == "kept\n"
    assert server.status(box) == "running"


@pytest.mark.parametrize(
    "word", ["poweroff", *(pytest.param(one, marks=LONG) for one in ("shutdown -h now", "halt"))]
)
def test_a_poweroff_from_inside_is_told_and_can_be_resumed(
    server: RealServer, box: str, word: str
) -> None:
    said(server, box, "echo kept > file")
    server.client.post(f"/v1/sandboxes/{box}/exec", json={"command": word})
    wait_until(lambda: server.status(box) == "error", limit_s=60, what="it ends")
    reason = server.get(box)["statusReason"]
    assert isinstance(reason, dict)
    assert reason["code"] == "powered_off"
    server.act(box, "resume")
    assert said(server, box, "cat file") == "kept\n"


def test_a_restart_helps_where_the_agent_is_cut_off(server: RealServer, box: str) -> None:
    said(server, box, "echo kept > file; sync")
    server.execute(box, "(sleep 1; ip link set eth0 down) >/dev/null 2>&1 &")
    wait_until(lambda: server.status(box) == "suspected_missing", limit_s=90, what="it is missed")
    server.act(box, "restart")
    assert said(server, box, "cat file") == "kept\n"


# --- disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 9, 11, 20, 100, 500])
def test_a_disk_of_any_size_is_as_large_as_it_says(server: RealServer, size: int) -> None:
    made = server.create(template="base-ubuntu", resources={"disk": f"{size}GB"}, wait=0)
    wait_until(lambda: server.status(made["id"]) == "running", limit_s=180, what="it runs")
    told = int(said(server, made["id"], "df --output=size -BM / | tail -1").strip(" M\n"))
    assert 0.9 * size * 1024 < told <= size * 1024
    said(server, made["id"], "dd if=/dev/zero of=file bs=1M count=64 conv=fsync 2>/dev/null")


def test_a_full_disk_grows_in_what_is_made_of_its_snapshot(server: RealServer) -> None:
    full = server.create(template="base-ubuntu", name="full", resources={"disk": "1GB"}, wait=0)
    wait_until(lambda: server.status("full") == "running", limit_s=180, what="it runs")
    # To write it all would take minutes where guests are emulated.
    left = "$(($(df -B1 --output=avail . | tail -1) - 100000000))"
    said(server, "full", f"fallocate -l {left} most")
    end = server.execute("full", "dd if=/dev/zero of=file bs=1M; sync", timeout=120_000)
    assert "No space left" in str(end["stderr"])
    snapshot = server.act(full["id"], "snapshots")["id"]
    (fork,) = server.act(full["id"], "fork", count=1)
    server.wait_running(fork["id"])
    assert said(server, fork["id"], "ls").split() == ["file", "most"]
    grown = server.create(template="base-ubuntu", snapshot=snapshot, resources={"disk": "30GB"})
    told = int(said(server, grown["id"], "df --output=avail -BM / | tail -1").strip(" M\n"))
    assert told > 28 * 1024


# --- what is written in the documentation ---------------------------------------------------------


def examples(page: str) -> str:
    """Return every example of a page that is a command to be typed, in order."""
    text = (ROOT / page).read_text()
    found = re.findall(r"```sh\n(.*?)```|(?<!`)`(sandyard [^`]*)`", text, re.DOTALL)
    lines = [
        re.sub(r"(?m)^ {3}", "", block) if block else re.sub(r"\s+", " ", inline)
        for block, inline in found
    ]
    skipped = (
        "git clone",
        "scripts/",
        "EDITOR",
        " ID",
        " REF",
        "doctor",
        "admin grant",
        "login",
        " mcp",
    )
    return "\n".join(one for one in lines if not any(word in one for word in skipped))


def kept_by(server: RealServer) -> set[str]:
    """Return the ids of the sandboxes and snapshots that are there."""
    kinds = ("sandboxes", "snapshots")
    return {one["id"] for kind in kinds for one in server.client.get(f"/v1/{kind}").json()["data"]}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/tutorial/first-sandbox.md",
        pytest.param("docs/howto/snapshots.md", marks=LONG),
        "docs/howto/containers.md",
    ],
)
def test_every_example_of_a_page_works_as_it_is_written(
    server: RealServer, tmp_path: Path, page: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".config").symlink_to(server.home / "xdg")
    before = kept_by(server)
    script = examples(page).replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
    assert script.count("sandyard") + script.count("curl") >= 2
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        env={
            **server.environment,
            "HOME": str(home),
            "PATH": f"{SANDYARD.parent}:{os.environ['PATH']}",
        },
        capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stderr.lower(), done.stderr
    assert kept_by(server) == before


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("README.md", ["42"]),
        pytest.param(
            "docs/howto/python.md",
            ["hello\n 3", "4.0", "ZeroDivisionError", "ReferenceError",
             "/workspace/notes/today.txt", "signature=", "<!DOCTYPE",
             "['running']", "SIGTERM", "['0', '1', '2']"],
            marks=LONG,
        ),
        ("docs/tutorial/agent.md", ["42\n", "sum 42", "max 23", "min 19"]),
    ],
)  # fmt: skip
def test_every_python_example_of_a_page_works_as_it_is_written(
    server: RealServer, tmp_path: Path, page: str, words: list[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    program = "\n".join(textwrap.dedent(one) for one in blocks)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "XDG_CONFIG_HOME": str(server.home / "xdg"),
             "SANDYARD_URL": f"http://127.0.0.1:{server.port}"},
        capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for word in words:
        assert word in done.stdout, done.stdout
    for one in server.client.get("/v1/snapshots").json()["data"]:
        server.client.delete(f"/v1/snapshots/{one['id']}")
