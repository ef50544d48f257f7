"""Templates of an organization's own, built in real machines from images that no registry has."""

import asyncio
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from tests.support.folders import files_with
from tests.support.images import ADDRESS, CACHE
from tests.support.oci import (
    bomb,
    docker_archive,
    file_entry,
    folder_entry,
    layer,
    link_entry,
    oci_archive,
    oci_layout,
    several,
    tree,
)
from tests.support.ports import free_port
from tests.support.registry import (
    NETWORK,
    PASSWORD,
    PORT,
    USER,
    put,
    registry,
)
from tests.support.server import NO_POOL, QEMU, RealServer, wait_until

pytestmark = [pytest.mark.machine]

BUILD_LIMIT_S = 600
SERVE = ["/bin/busybox", "httpd", "-f", "-p", "8080"]
CHECK = "/bin/busybox wget -q -O - http://127.0.0.1:8080/"
CONFIG: dict[str, Any] = {
    "Entrypoint": SERVE,
    "Env": ["GREETING=hello there", "PATH=/bin"],
    "WorkingDir": "/srv",
    "User": "1000:1000",
    "Healthcheck": {"Test": ["CMD-SHELL", CHECK]},
    "Volumes": {"/data": {}},
}


@pytest.fixture(scope="module")
def repositories() -> Iterator[Path]:
    """The folder of a registry's repositories."""
    with (
        tempfile.TemporaryDirectory(prefix="registry-", dir="/tmp") as folder,
        registry(Path(folder)),
    ):
        yield Path(folder)


@pytest.fixture(scope="module")
def server(repositories: Path) -> Iterator[RealServer]:
    made = RealServer(
        free_port(), **QEMU, **NO_POOL,
        SANDYARD_NODE__ALLOW=json.dumps([NETWORK]), SANDYARD_BUILDS__DISK_MIB="3072",
    )  # fmt: skip
    made.share_goldens("builder")
    try:
        made.run("template", "build", "builder", limit_s=1200)
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def busybox(server: RealServer) -> bytes:
    """One static program: all that some images have."""
    for archive in (CACHE / "packages").glob("tools-*.tar.zst"):
        done = subprocess.run(
            ["tar", "--zstd", "-xOf", archive, "./usr/bin/busybox"], capture_output=True
        )
        if done.returncode == 0:
            return done.stdout
    raise AssertionError("the tools have no busybox")


def upload(server: RealServer, data: bytes) -> str:
    answer = server.client.post("/v1/templates/uploads", content=data)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["data"]["uploadId"])


def request(server: RealServer, slug: str, **body: object) -> str:
    answer = server.client.post("/v1/templates", json={"slug": slug, **body})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["data"]["buildId"])


def ended(server: RealServer, slug: str, build: str) -> tuple[dict[str, Any], list[str]]:
    """Follow the log of a build to its end, and return both."""
    lines: list[str] = []
    with server.client.stream("GET", f"/v1/templates/{slug}/logs", params={"build": build}) as told:
        name = ""
        for line in told.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                if name == "end":
                    return data, lines
                lines.append(data["text"])
    raise AssertionError(f"the log broke off after {lines}")


def built(server: RealServer, slug: str, **body: object) -> list[str]:
    """Build a template and return the lines of its log."""
    build, lines = ended(server, slug, request(server, slug, **body))
    assert build["status"] == "ready", (build["error"], lines[-9:])
    return lines


def nothing_is_left(server: RealServer) -> None:
    """Return once no machine is left of any build, and no upload."""
    wait_until(lambda: server.machines() == set(), what="no machine is left")
    assert list((server.home / "uploads").glob("*")) == []
    assert list((server.home / "versions").glob(".part-*")) == []


async def copied(server: RealServer, name: str, data: bytes) -> bytes:
    """Write a file of a sandbox by sftp, and read it."""
    key = server.client.headers["authorization"].removeprefix("Bearer ")
    async with (
        asyncssh.connect(
            "127.0.0.1", server.ssh_port, username=name, password=key, known_hosts=None,
            client_keys=None,
        ) as connection,
        connection.start_sftp_client() as sftp,
    ):  # fmt: skip
        async with sftp.open("/root/copied", "wb") as file:
            await file.write(data)
        async with sftp.open("/root/copied", "rb") as file:
            found = await file.read()
    assert isinstance(found, bytes)
    return found


def test_an_image_of_one_program_is_a_template(server: RealServer, busybox: bytes) -> None:
    page = file_entry("srv/index.html", b"it works\n")
    image = docker_archive(
        [
            layer([file_entry("bin/busybox", busybox, mode=0o755), folder_entry("srv")]),
            layer([page, file_entry("srv/gone", b"x")]),
            layer([file_entry("srv/.wh.gone")]),
        ],
        CONFIG,
    )
    lines = built(server, "tiny", upload=upload(server, image))
    assert any(one.startswith("not used: VOLUME") for one in lines)
    nothing_is_left(server)

    told = server.client.get("/v1/templates/tiny").json()["data"]
    assert (told["status"], told["os"], told["kind"]) == ("ready", "Linux", "headless")
    (version,) = server.client.get("/v1/templates/tiny/versions").json()["data"]
    assert (version["tags"], version["defaultUser"]) == (["latest"], "1000:1000")
    box = server.create(template="tiny", name="t", env={"MORE": "1"}, idleTimeout=0)
    assert (box["template"], box["templateDigest"]) == ("tiny", version["digest"])
    asked = f"id -u; pwd; echo $GREETING $MORE; ls; {CHECK}"
    said = "1000\n/srv\nhello there 1\nindex.html\nit works\n"
    assert server.execute("t", asked)["stdout"] == said
    assert server.execute("t", "id -u; pwd", user="root", cwd="/")["stdout"] == "0\n/\n"
    assert asyncio.run(copied(server, "t", b"by sftp")) == b"by sftp"
    # What the image has running goes on after a pause, and is started again after a restart.
    server.act("t", "pause")
    server.act("t", "resume")
    assert server.execute("t", asked)["stdout"] == said
    server.act("t", "restart")
    wait_until(lambda: server.execute("t", CHECK)["exitCode"] == 0)
    assert server.execute("t", asked)["stdout"] == said

    # Deleted, it is gone for others, and the sandbox keeps what it needs of it.
    assert server.client.delete("/v1/templates/tiny").status_code == 200
    assert server.client.get("/v1/templates/tiny").status_code == 404
    assert server.client.post("/v1/sandboxes", json={"template": "tiny"}).status_code == 400
    server.act("t", "restart")
    assert server.execute("t", "id -u; echo $GREETING")["stdout"] == "1000\nhello there\n"
    server.delete("t")
    folder = server.home / "versions" / version["digest"]
    assert folder.is_dir()
    wait_until(lambda: not folder.exists(), limit_s=150, what="its bytes are gone")


def test_the_image_for_sandboxes_is_taken_from_an_archive_of_several(
    server: RealServer, busybox: bytes
) -> None:
    lower = layer(
        [
            file_entry("bin/busybox", busybox, mode=0o755), folder_entry("d"),
            file_entry("d/hidden", b"x"), folder_entry("was"), file_entry("was/in", b"x"),
        ]
    )  # fmt: skip
    upper = layer([file_entry("d/.wh.hidden"), file_entry("was", b"a file now\n")])
    ours = oci_layout([lower, upper], {"Cmd": ["/bin/busybox", "sleep", "9"]}, compress="zstd")
    theirs = oci_layout([tree({"theirs": b"x"})], {}, architecture="arm64")
    archive = tree(several(theirs, ours), mode=0o644)
    built(server, "chosen", upload=upload(server, archive))
    box = server.create(template="chosen")["id"]
    assert server.execute(box, "ls /d; cat /was; ls /theirs")["stdout"] == "a file now\n"
    server.delete(box)


def test_an_image_is_pulled_and_pinned(
    server: RealServer, busybox: bytes, repositories: Path
) -> None:
    layers = [layer([file_entry("bin/busybox", busybox, mode=0o755), folder_entry("srv")])]
    files = oci_layout(
        layers, {"Env": ["A=b"], "Cmd": ["/bin/busybox", "sleep", "9"]}, compress="zstd"
    )
    for name in ("busy", "liar", "elsewhere"):
        put(repositories, name, files)
    lines = built(server, "pulled", image=f"{ADDRESS}:{PORT}/busy:1")
    (pinned,) = (one.removeprefix("digest: ") for one in lines if one.startswith("digest: "))
    (version,) = server.client.get("/v1/templates/pulled/versions").json()["data"]
    assert version["source"] == {"image": f"{ADDRESS}:{PORT}/busy:1", "digest": pinned}
    box = server.create(template="pulled")["id"]
    assert server.execute(box, "echo $A; pwd")["stdout"] == "b\n/workspace\n"
    server.delete(box)
    built(server, "pulled", image=f"{ADDRESS}:{PORT}/busy:1@{pinned}")

    for name, said in {
        "liar": "digest",
        "elsewhere": "169.254.169.254",
        "absent": "absent",
    }.items():
        image = f"{ADDRESS}:{PORT}/{name}:1"
        build, lines = ended(server, name, request(server, name, image=image))
        assert build["status"] == "failed", name
        assert any(said in one for one in lines), lines
    nothing_is_left(server)


def test_a_registry_with_a_password(server: RealServer, busybox: bytes, repositories: Path) -> None:
    """The password is for its host alone, and in nothing that stays."""
    layers = [layer([file_entry("bin/busybox", busybox, mode=0o755)])]
    image = put(repositories, "closed", oci_layout(layers, {}))
    build, lines = ended(server, "closed", request(server, "closed", image=image))
    assert build["status"] == "failed"
    assert any("auth" in one or "401" in one for one in lines), lines
    file = server.home / "password"
    file.write_text(PASSWORD)
    host = f"{ADDRESS}:{PORT}"
    done = server.run("registry", "add", host, "-u", USER, "--password-file", file)
    file.unlink()
    credential = done.stdout.strip()
    lines = built(server, "closed", image=image, credentials=credential)
    show = json.dumps(["/bin/busybox", "sh", "-c", "cat /run/build/* $REGISTRY_AUTH_FILE || true"])
    text = f"FROM {image}\nRUN {show}\n"
    build, more = ended(
        server, "closed", request(server, "closed", dockerfile=text, credentials=credential)
    )
    said = "\n".join((*lines, *more))
    assert PASSWORD not in said
    box = server.create(template="closed")["id"]
    look = f"grep -rlF {PASSWORD} /bin /etc /root /run/sandyard/base /tmp /usr /workspace"
    assert server.execute(box, look)["stdout"] == ""
    server.delete(box)
    assert files_with(PASSWORD.encode(), server.home) == []


def test_steps_that_were_taken_before_are_not_taken_again(
    server: RealServer, busybox: bytes, repositories: Path
) -> None:
    layers = [layer([file_entry("bin/busybox", busybox, mode=0o755)])]
    image = put(repositories, "steady", oci_layout(layers, {"Env": ["WHO=me"], "User": "7"}))
    first = "/bin/busybox --install -s /bin; echo one $WHO >>/said; id -u >>/said"
    built(server, "steady", image=image, run=[first])

    lines = built(server, "steady", image=image, run=[first, "echo two >>/said"])
    assert [one for one in lines if one.startswith(("cached", "running"))] == [
        f"cached: running: {first}", "running: echo two >>/said"
    ]  # fmt: skip
    box = server.create(template="steady")["id"]
    assert server.execute(box, "cat /said; id -u")["stdout"] == "one me\n0\ntwo\n7\n"
    server.delete(box)

    lines = built(server, "steady", image=image, run=[first], force=True)
    assert f"running: {first}" in lines

    # What is secret is in none of it.
    kept = {one["id"] for one in server.client.get("/v1/snapshots").json()["data"]}
    secret = "not to be seen by anyone"
    run = ["cat /run/secrets/KEY; /bin/busybox md5sum </run/secrets/KEY >/sum"]
    lines = built(
        server, "steady", image=image, run=[first, *run], secrets={"KEY": secret}
    )  # fmt: skip
    assert f"running: {first}" in lines
    assert "***" in lines
    assert secret not in "".join(lines)
    assert kept == {one["id"] for one in server.client.get("/v1/snapshots").json()["data"]}
    box = server.create(template="steady")["id"]
    digest = hashlib.md5(secret.encode(), usedforsecurity=False).hexdigest()
    assert server.execute(box, "cat /sum; ls /run/secrets")["stdout"] == f"{digest}  -\n"
    server.delete(box)
    assert files_with(secret.encode(), server.home) == []
    for one in kept:
        assert server.client.delete(f"/v1/snapshots/{one}").status_code == 200
    nothing_is_left(server)


def test_a_tag_that_moves_is_pulled_as_it_was_pinned(
    server: RealServer, busybox: bytes, repositories: Path
) -> None:
    both = []
    for number in (1, 2):
        entries = [file_entry("bin/busybox", busybox, mode=0o755), file_entry(f"is-{number}")]
        both.append(oci_layout([layer(entries)], {"Env": [f"IS={number}"]}))
    index = json.loads(both[0]["index.json"])
    index["manifests"] += json.loads(both[1]["index.json"])["manifests"]
    image = put(
        repositories, "moves", {**both[0], **both[1], "index.json": json.dumps(index).encode()}
    )
    built(server, "moves", image=image)
    box = server.create(template="moves")["id"]
    # Its settings and its files are of one image.
    assert server.execute(box, "[ -e /is-$IS ] && ls / | grep -c is-")["stdout"] == "1\n"
    server.delete(box)


def context(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in files.items():
            archive.addfile(file_entry(name, data, mode=0o755), io.BytesIO(data))
    return made.getvalue()


DOCKERFILE = """\
FROM scratch AS base
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]

FROM base AS made
WORKDIR /app
COPY . .
RUN <<EOT
set -e
rm busybox
echo "app:x:1234:1234::/app:/bin/sh" > /etc/passwd
chmod 4755 /app/run
EOT

FROM base
COPY --from=made /app /app
COPY --from=made /etc/passwd /etc/passwd
ENV COLOR="dark blue"
WORKDIR /app
USER app
ONBUILD RUN ["false"]
"""


def test_a_dockerfile_is_built_and_steps_are_added_to_what_it_made(
    server: RealServer, busybox: bytes, tmp_path: Path
) -> None:
    """By the command line: the folder is sent without what its `.dockerignore` names."""
    folder = tmp_path / "Dock"
    (folder / "sub").mkdir(parents=True)
    for name, data in {
        "Dockerfile": DOCKERFILE.encode(), "busybox": busybox, "run": b"#!/bin/sh\necho ran\n",
        "sub/kept": b"kept", "sub/one.log": b"no", ".dockerignore": b"**/*.log\nDockerfile\n",
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o755)
    done = server.run("template", "build", f"{folder}/", limit_s=BUILD_LIMIT_S, check=False)
    assert "dock:1 is ready" in done.stdout, (done.stdout, done.stderr)
    server.create(template="dock", name="d")
    asked = "id -un; pwd; echo $COLOR; find . -type f | sort; stat -c %a run; cat sub/kept"
    assert server.execute("d", asked)["stdout"] == (
        "app\n/app\ndark blue\n./.dockerignore\n./run\n./sub/kept\n4755\nkept"
    )
    server.delete("d")

    # Built again, nothing is done twice; what no later instruction depends on is changed.
    (folder / "Dockerfile").write_text(f"{DOCKERFILE}RUN true\n")
    done = server.run("template", "build", f"{folder}/", limit_s=BUILD_LIMIT_S, check=False)
    assert "dock:2 is ready" in done.stdout, (done.stdout, done.stderr)
    assert done.stdout.count("Using cache") == 11  # all instructions that make a layer

    # A third version, on the second one.
    files = [{"path": "/opt/deep/a file", "contents": "of mine", "mode": "600"}]
    built(
        server, "dock", base="dock", files=files, env={"COLOR": "red", "X": "y z"},
        run=["echo $COLOR $X >/opt/said; id -u >>/opt/said; pwd >>/opt/said"],
        start="echo on >/app/on; exec sleep 86400", ready="grep -q on /app/on",
        defaultUser="root", defaults={"memory": "256MB", "disk": "2GB"},
    )  # fmt: skip
    versions = server.client.get("/v1/templates/dock/versions").json()["data"]
    assert [(one["version"], one["tags"]) for one in versions] == [
        (3, ["latest"]),
        (2, []),
        (1, []),
    ]
    box = server.create(template="dock", name="d")
    assert box["resources"] == {"vcpus": 1, "memory": "256MB", "disk": "2GB"}
    asked = "cat /opt/said '/opt/deep/a file'; stat -c %a '/opt/deep/a file'; id -u; cat /app/on"
    assert server.execute("d", asked)["stdout"] == "red y z\n0\n/app\nof mine600\n0\non\n"
    server.delete("d")
    server.run("template", "tag", "dock", "old", "2")
    for reference in ("dock:old", "dock:2", f"dock@{versions[1]['digest']}"):
        box = server.create(template=reference)
        assert box["templateDigest"] == versions[1]["digest"]
        server.delete(box["id"])
    server.run("template", "delete", "dock:3")
    assert server.create(template="dock")["templateDigest"] == versions[1]["digest"]
    for one in server.machines():
        server.delete(one)
    nothing_is_left(server)


def test_a_template_with_debian_in_it(server: RealServer) -> None:
    built(
        server, "served", base="base-minimal",
        start="exec python3 -m http.server 9000 --directory /etc",
        ready="python3 -c 'import urllib.request as u; u.urlopen(\"http://127.0.0.1:9000/hostname\")'",
        defaultUser="nobody", workdir="/tmp",
    )  # fmt: skip
    first, second = (server.create(template="served")["id"] for _ in range(2))
    both = [server.execute(one, "id -un; pwd; cat /etc/machine-id")["stdout"] for one in
            (first, second)]  # fmt: skip
    assert both[0] != both[1]
    assert all(str(one).startswith("nobody\n/tmp\n") for one in both)
    assert any("http.server 9000" in one for one in server.running(first))
    for one in (first, second):
        server.delete(one)


HOSTILE = {
    "names that lead out": [
        file_entry("../../../../outside", b"x"), file_entry("/../outside", b"x"),
        link_entry("way", "/etc"), file_entry("way/cron.d/outside", b"x"),
        link_entry("up", "../../../../../../.."), file_entry("up/outside", b"x"),
        link_entry("linked", "../../../../etc/passwd", is_hard=True),
    ],
    "whiteouts of all": [
        file_entry(".wh..."), file_entry("../.wh.etc"), file_entry(".wh..wh..opq"),
    ],
    "names that no shell would like": [
        file_entry("a\nb\x1b[2J", b"x"), file_entry("-rf", b"x"), file_entry("same", b"1"),
        file_entry("same", b"2"),
    ],
    "devices and a forged agent": [
        file_entry("disk", type=tarfile.BLKTYPE, devmajor=254, devminor=0),
        file_entry("etc/inittab", b"::sysinit:/bin/busybox touch /forged\n"),
        file_entry("usr/lib/sandyard/start", b"#!/bin/busybox sh\nexit 1\n", mode=0o755),
        file_entry("usr/lib/sandyard/command.json", b'{"shell": "touch /forged"}'),
        link_entry("run", "/etc"), link_entry("tmp", "/usr"), link_entry("etc/resolv.conf", "/x"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_meets_nothing_but_its_own_machine(
    server: RealServer, busybox: bytes, name: str
) -> None:
    """Whether it can be unpacked or not, the host is as it was, and the server goes on."""
    passwd = Path("/etc/passwd").read_bytes()
    image = oci_archive(
        [layer([file_entry("bin/busybox", busybox, mode=0o755), *HOSTILE[name]])], {}
    )
    slug = "hostile-" + str(sorted(HOSTILE).index(name))
    build, lines = ended(server, slug, request(server, slug, upload=upload(server, image)))
    if build["status"] == "ready":
        box = server.create(template=slug)["id"]
        assert server.execute(box, "echo alive; cat /etc/resolv.conf")["stdout"] == (
            "alive\nnameserver 172.16.0.1\noptions timeout:3 attempts:2\n"
        )
        assert server.execute(box, "[ -e /forged ]")["exitCode"] != 0
        server.delete(box)
    else:
        assert build["error"]
        assert lines[-1] == f"the build ended: {build['error']}"
    assert not any("\x1b" in one for one in lines)
    assert Path("/etc/passwd").read_bytes() == passwd
    assert not any(Path(one, "outside").exists() for one in ("/", "/etc/cron.d", server.home))
    nothing_is_left(server)


def many_layers(count: int, busybox: bytes) -> bytes:
    first = layer([file_entry("bin/busybox", busybox, mode=0o755)])
    return oci_archive(
        [first, *(layer([file_entry(f"srv/{one}", b"x")]) for one in range(count - 1))], {}
    )


LARGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "130 layers": (partial(many_layers, 130), "ready"),
    "six megabytes of settings": (
        lambda _: oci_archive(
            [layer([])], {"Env": [f"A{one}={'x' * 99}" for one in range(60_000)]}
        ),
        "failed",
    ),
    "600 layers": (partial(many_layers, 600), "ready"),
    "a file larger than the disk": (lambda _: bomb("srv/zeros", 4096), "failed"),
    "three million files": (
        lambda _: oci_archive(
            [layer(file_entry(f"srv/{one:07}") for one in range(3_000_000))], {}
        ),
        "failed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        one if number < 2 else pytest.param(one, marks=pytest.mark.long)
        for number, one in enumerate(LARGE)
    ],
)
def test_a_large_image_ends_at_a_limit_of_its_machine(
    server: RealServer, busybox: bytes, name: str
) -> None:
    make, status = LARGE[name]
    slug = "large-" + str(sorted(LARGE).index(name))
    build, lines = ended(server, slug, request(server, slug, upload=upload(server, make(busybox))))
    assert build["status"] == status, (build["error"], lines[-5:])
    if status == "ready":
        box = server.create(template=slug)["id"]
        assert server.execute(box, "ls /srv | wc -l")["stdout"] == f"{int(name.split()[0]) - 1}\n"
        server.delete(box)
    nothing_is_left(server)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no archive": ({"upload": b"no archive at all"}, "a command ended with"),
    "a step that fails": ({"base": "base-minimal", "run": ["echo begun; exit 7"]}, "ended with 7"),
    "a Dockerfile that is none": ({"dockerfile": "FRAM scratch"}, "a command ended with"),
    "a command that reads and floods": (
        {"base": "base-minimal",
         "run": [r"cat; printf '\033[2J\033]0;title\007\n'; yes flood | head -n 600000", "exit 9"]},
        "ended with 9",
    ),
    "a command that ends everything": (
        {"base": "base-minimal", "run": ["kill -9 -1"]}, "the agent included",
    ),
    "an image of another architecture": (
        {"upload": oci_archive([tree({"a": b"x"})], {}, architecture="arm64")},
        "it is for linux/arm64, and sandboxes need linux/amd64",
    ),
    "a full disk": (
        {"base": "base-minimal", "defaults": {"disk": "1GB"},
         "run": ["dd if=/dev/zero of=/big bs=1M"]},
        "ended with 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_build_that_fails_says_why_and_leaves_nothing(server: RealServer, name: str) -> None:
    body, why = BAD[name]
    if isinstance(body.get("upload"), bytes):
        body = {"upload": upload(server, body["upload"])}
    slug = "bad-" + str(sorted(BAD).index(name))
    build, lines = ended(server, slug, request(server, slug, **body))
    assert (build["status"], build["version"]) == ("failed", 1)
    assert why in build["error"], (build, lines)
    assert sum(map(len, lines)) < 3 * 2**20
    assert not any("\x1b" in one for one in lines)
    answer = server.client.post("/v1/sandboxes", json={"template": slug})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    nothing_is_left(server)


def test_a_build_goes_on_after_the_server_was_killed_and_ends_when_it_is_cancelled(
    server: RealServer,
) -> None:
    run = ["until [ -e /go ]; do sleep 0.2; done; echo gone on"]
    build = request(server, "killed", base="base-minimal", run=run)

    def box() -> str | None:
        found = server.client.get(f"/v1/templates/killed/builds/{build}").json()["data"]
        return found["sandboxId"] if found["phase"] == "steps" else None

    wait_until(lambda: box() is not None, limit_s=120)
    first = box()
    server.kill()
    server.start()
    wait_until(lambda: box() not in (None, first), limit_s=120, what="it has begun again")
    assert server.execute(box(), "touch /go", user="root")["exitCode"] == 0
    told, lines = ended(server, "killed", build)
    assert told["status"] == "ready", lines
    assert "the build starts again: its server ended" in lines
    assert "gone on" in lines
    nothing_is_left(server)

    build = request(server, "killed", base="killed", run=["sleep 1000"])
    wait_until(lambda: box() is not None, limit_s=120)
    path = f"/v1/templates/killed/builds/{build}/cancel"
    assert server.client.post(path).status_code == 200
    told, _ = ended(server, "killed", build)
    assert told["status"] == "cancelled"
    assert server.client.post(path).status_code == 409
    versions = server.client.get("/v1/templates/killed/versions").json()["data"]
    assert [(one["version"], one["tags"]) for one in versions] == [(1, ["latest"])]
    nothing_is_left(server)
