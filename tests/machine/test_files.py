"""Files of real machines: as their users see them, whatever they are called."""

import base64
import hashlib
import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.events import events_of
from tests.support.server import RealServer, is_slow, longer, some, wait_until

pytestmark = pytest.mark.machine


def url_of(box: object, action: str = "") -> str:
    return f"/v1/sandboxes/{box}/files{action and '/'}{action}"


def put(server: RealServer, box: object, path: str, data: bytes, **query: object) -> None:
    params: Any = {"path": path, **query}
    answer = server.client.put(url_of(box), params=params, content=data)
    assert answer.status_code == 201, answer.text


def read(server: RealServer, box: object, path: str, **query: object) -> httpx.Response:
    params: Any = {"path": path, **query}
    return server.client.get(url_of(box), params=params)


def stat(server: RealServer, box: object, path: str) -> dict[str, Any]:
    answer = server.client.get(url_of(box, "stat"), params={"path": path})
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def said(server: RealServer, box: object, command: str) -> str:
    return str(server.execute(box, command)["stdout"]).strip()


def test_files_go_in_and_come_out_as_they_are(server: RealServer, box: str) -> None:
    data = os.urandom(some(3_000_000) + 1)
    put(server, box, "/tmp/deep/er/file", data, mode="0640", owner="nobody")
    assert said(server, box, "stat -c '%a %U %s' /tmp/deep/er/file") == f"640 nobody {len(data)}"
    digest = hashlib.sha256(data).hexdigest()
    assert said(server, box, "sha256sum < /tmp/deep/er/file").split()[0] == digest
    assert read(server, box, "/tmp/deep/er/file").content == data
    # Written again it keeps whose it is, and who has it open reads the old one to its end.
    before = stat(server, box, "/tmp/deep/er/file")
    put(server, box, "/tmp/deep/er/file", b"new")
    after = stat(server, box, "/tmp/deep/er/file")
    assert (after["mode"], after["owner"], after["size"]) == (before["mode"], "nobody", 3)
    # In place it stays the same file, and a link is followed.
    said(server, box, "echo long before > /tmp/real; chmod 600 /tmp/real; ln -sf real /tmp/link")
    inode = said(server, box, "stat -c %i /tmp/real")
    put(server, box, "/tmp/link", b"in", inPlace=True)
    assert said(server, box, "stat -c '%i %a' /tmp/real; cat /tmp/real") == f"{inode} 600\nin"
    put(server, box, "/tmp/link", b"by")
    assert said(server, box, "readlink /tmp/link; cat /tmp/real") == "real\nby"
    link = stat(server, box, "/tmp/link")
    assert (link["type"], link["target"]) == ("link", "real")
    assert said(server, box, "ls -a /tmp /tmp/deep/er | grep -c sandyard-") == "0"


def test_files_without_a_size_and_what_is_no_file(server: RealServer, box: str) -> None:
    answer = read(server, box, "/proc/version")
    assert answer.text.startswith("Linux version")
    part = server.client.get(
        url_of(box), params={"path": "/etc/hostname"}, headers={"Range": "bytes=1-3"}
    )
    assert (part.status_code, part.text) == (206, said(server, box, "cat /etc/hostname")[1:4])
    said(server, box, "mkfifo /tmp/pipe; python3 -c \"import socket; "
                      "socket.socket(socket.AF_UNIX).bind('/tmp/sock')\"")  # fmt: skip
    for path in ("/tmp/pipe", "/dev/zero"):
        for answer in (
            read(server, box, path),
            server.client.put(url_of(box), params={"path": path}),
        ):
            assert answer.status_code == 400, answer.text
            assert "no plain file" in answer.json()["error"]["message"]
    assert stat(server, box, "/tmp/sock")["type"] == "other"


def test_each_does_what_its_user_may(server: RealServer, box: str) -> None:
    assert read(server, box, "/etc/shadow").status_code == 200
    said(server, box, "ln -sf /etc/shadow /tmp/to-shadow; install -d -o nobody /tmp/nobodys")
    for path in ("/etc/shadow", "/tmp/to-shadow"):
        answer = read(server, box, path, user="nobody")
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (403, "denied")
    answer = server.client.put(
        url_of(box), params={"path": "/root/x", "user": "nobody"}, content=b"x"
    )
    assert answer.json()["error"]["details"]["reason"] == "denied"
    put(server, box, "/tmp/nobodys/own", b"x", user="nobody")
    assert stat(server, box, "/tmp/nobodys/own")["owner"] == "nobody"
    assert read(server, box, "/x", user="ghost").status_code == 400


def test_what_is_refused_changes_nothing_and_rights_are_not_given_away(
    server: RealServer, box: str
) -> None:
    said(
        server,
        box,
        "echo mine > /tmp/open; chmod 666 /tmp/open; cp /bin/true /tmp/suid; "
        "chown nobody /tmp/suid; chmod 4755 /tmp/suid; "
        "install -d -o nobody /dev/shm/nobodys; cp -p /tmp/suid /dev/shm/nobodys/suid",
    )
    for query in ({"mode": "0600"}, {"owner": "root"}):
        params = {"path": "/tmp/open", "user": "nobody", "inPlace": "true", **query}
        answer = server.client.put(url_of(box), params=params, content=b"x")
        assert answer.status_code == 403, answer.text
        assert said(server, box, "cat /tmp/open") == "mine"
    put(server, box, "/tmp/open", b"theirs", user="nobody", inPlace=True)
    assert said(server, box, "cat /tmp/open; stat -c ' %U %a' /tmp/open") == "theirs root 666"
    for action, body, told in (
        ("copy", {"from": "/tmp/suid", "to": "/tmp/suid2"}, "/tmp/suid2 root 755"),
        ("move", {"from": "/dev/shm/nobodys", "to": "/tmp/moved"}, "/tmp/moved/suid nobody 4755"),
    ):
        answer = server.client.post(url_of(box, action), json=body)
        assert answer.is_success, answer.text
        path = told.split()[0]
        assert said(server, box, f"stat -c '%n %U %a' {path}") == told
    # A device is nobody's to copy, and what was made of it is gone.
    answer = server.client.post(url_of(box, "copy"), json={"from": "/dev", "to": "/tmp/devices"})
    assert answer.status_code == 400, answer.text
    assert said(server, box, "ls -d /tmp/devices /tmp/.sandyard-* 2>/dev/null | wc -l") == "0"
    # A link over a file, a file over a link: each replaces, and is followed by nobody.
    said(server, box, "echo kept > /tmp/kept; ln -sf kept /tmp/l; echo new > /tmp/new")
    for source, target in (("/tmp/new", "/tmp/l"), ("/tmp/l", "/tmp/new2"), ("/tmp/l", "/tmp/new")):
        answer = server.client.post(
            url_of(box, "copy"), json={"from": source, "to": target, "overwrite": True}
        )
        assert answer.status_code == 201, answer.text
    assert said(server, box, "cat /tmp/kept") == "kept"


def test_odd_files_are_told_of_all_the_same(server: RealServer, box: str) -> None:
    answer = read(server, box, "/sys/kernel/mm/transparent_hugepage/enabled")
    assert "never" in answer.text or answer.status_code == 404
    assert read(server, box, "/sys/class/net/lo/mtu").text.strip() == "65536"
    whole = server.client.get(
        url_of(box), params={"path": "/proc/version"}, headers={"Range": "bytes=3-"}
    )
    assert (whole.status_code, whole.text[:5]) == (200, "Linux")
    said(server, box, "mkdir -p /dev/shm/odd; touch -d @99999999999 /dev/shm/odd/late; "
                      "touch -d @-99999999999 /dev/shm/odd/early")  # fmt: skip
    listed = server.client.get(url_of(box, "list"), params={"path": "/dev/shm/odd"})
    assert len(listed.json()["data"]["entries"]) == 2
    deep = "import os; os.makedirs('/tmp/deep0'); os.chdir('/tmp/deep0')\n" \
           "for n in range(1200): os.mkdir('d'); os.chdir('d')"  # fmt: skip
    server.execute(box, "python3 -", stdin=deep)
    answer = server.client.delete(url_of(box), params={"path": "/tmp/deep0", "recursive": "true"})
    assert answer.status_code in (200, 400), answer.text
    assert said(server, box, "rm -rf /tmp/deep0; echo fine") == "fine"


def test_folders(server: RealServer, box: str) -> None:
    said(server, box, "mkdir -p /srv/a/b/c; echo 1 > /srv/a/one; echo 22 > /srv/a/b/two; "
                      "ln -s /srv/a /srv/a/b/loop")  # fmt: skip
    listed = server.client.get(url_of(box, "list"), params={"path": "/srv/a", "depth": 3})
    entries = listed.json()["data"]["entries"]
    assert [(one["path"], one["type"]) for one in entries] == [
        ("/srv/a/b", "folder"), ("/srv/a/b/c", "folder"), ("/srv/a/b/loop", "link"),
        ("/srv/a/b/two", "file"), ("/srv/a/one", "file"),
    ]  # fmt: skip
    for action, body, status in (
        ("copy", {"from": "/srv/a", "to": "/srv/z"}, 201),
        ("move", {"from": "/srv/z/b", "to": "/dev/shm/other-device"}, 200),
        ("move", {"from": "/srv/z/one", "to": "/srv/a/one"}, 409),
        ("move", {"from": "/srv/z/one", "to": "/srv/a/one", "overwrite": True}, 200),
        ("move", {"from": "/srv/a", "to": "/srv/a/b/inside"}, 400),
        ("copy", {"from": "/srv/nothing", "to": "/srv/y"}, 404),
        ("mkdir", {"path": "/srv/a/one/x"}, 400),
        ("mkdir", {"path": "/srv/m/n", "mode": "2770", "owner": "nobody"}, 201),
    ):
        answer = server.client.post(url_of(box, action), json=body)
        assert answer.status_code == status, (action, body, answer.text)
    assert said(server, box, "cat /dev/shm/other-device/two; ls /srv/z; stat -c '%a %U' /srv/m/n") \
        == "22\n2770 nobody"  # fmt: skip
    for query, status in (
        ({"path": "/srv/a"}, 409), ({"path": "/srv/a", "recursive": "true"}, 200),
        ({"path": "/srv/a"}, 404), ({"path": "/", "recursive": "true"}, 400),
        ({"path": "/srv/../srv/..", "recursive": "true"}, 400), ({"path": "/proc/1"}, 409),
        ({"path": "/proc/1/comm"}, 403),
    ):  # fmt: skip
        answer = server.client.delete(url_of(box), params=query)
        assert answer.status_code == status, (query, answer.text)
    assert said(server, box, "ls /usr/bin/bash") == "/usr/bin/bash"


def test_names_of_any_bytes(server: RealServer, box: str) -> None:
    said(server, box, "mkdir -p /tmp/odd")
    longest = b"\xfe" * 255
    for name in (b"new\nline", b"\xff\xfe", "ü 🏖".encode(), b" %41+&=#?", longest):
        in_base64 = base64.b64encode(b"/tmp/odd/" + name).decode()
        answer = server.client.put(url_of(box), params={"pathBase64": in_base64}, content=name)
        assert answer.status_code == 201, answer.text
        found = server.client.get(url_of(box), params={"pathBase64": in_base64})
        assert found.content == name
    listed = server.client.get(url_of(box, "list"), params={"path": "/tmp/odd"}).json()
    assert len(listed["data"]["entries"]) == 5
    assert said(server, box, "ls /tmp/odd | wc -c") != "0"
    answer = server.client.put(url_of(box), params={"path": "/tmp/" + "x" * 256}, content=b"")
    assert answer.status_code == 400


def test_a_full_disk_leaves_the_old_file_whole(server: RealServer) -> None:
    box = server.create()["id"]
    said(server, box, "mkdir -p /small && mount -t tmpfs -o size=2m small /small")
    put(server, box, "/small/file", b"whole")
    answer = server.client.put(
        url_of(box), params={"path": "/small/file"}, content=bytes(5_000_000)
    )
    assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (409, "no_space")
    assert said(server, box, "cat /small/file; echo; ls -A /small") == "whole\nfile"


def test_archives_both_ways(server: RealServer, box: str, tmp_path: Path) -> None:
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w") as archive:
        for name, data in (("a/one", b"1"), ("a/b/two", os.urandom(some(500_000)))):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    odd = base64.b64encode(b"/tmp/un\xffpacked\n").decode()
    answer = server.client.put(
        url_of(box, "archive"), params={"pathBase64": odd}, content=inside.getvalue()
    )
    assert answer.status_code == 201, answer.text
    back = server.client.get(url_of(box, "archive"), params={"pathBase64": odd})
    assert back.status_code == 200
    with tarfile.open(fileobj=io.BytesIO(back.content)) as archive:
        files = {
            one.name.removeprefix("./"): archive.extractfile(one) for one in archive if one.isfile()
        }
        with tarfile.open(fileobj=io.BytesIO(inside.getvalue())) as before:
            for name in ("a/one", "a/b/two"):
                found, meant = files[name], before.extractfile(name)
                assert found is not None
                assert meant is not None
                assert found.read() == meant.read()
    answer = server.client.put(
        url_of(box, "archive"), params={"path": "/tmp/no"}, content=b"no archive" * 100
    )
    assert answer.status_code == 400
    assert "tar" in answer.json()["error"]["message"]
    for path, status in (("/tmp/nothing", 404), ("/etc/hostname", 400)):
        answer = server.client.get(url_of(box, "archive"), params={"path": path})
        assert answer.status_code == status, answer.text


def test_a_large_file_goes_through_and_nobody_holds_it(server: RealServer, box: str) -> None:
    def resident() -> int:
        assert server.process is not None
        with open(f"/proc/{server.process.pid}/status") as file:
            line = next(line for line in file if line.startswith("VmRSS"))
        return int(line.split()[1]) // 1024

    if is_slow():
        pytest.skip("NOT RUN: a guest whose kernel is emulated would take an hour")
    size = 150_000_000
    piece = os.urandom(2**20)
    digest = hashlib.sha256()

    def body() -> Iterator[bytes]:
        for start in range(0, size, len(piece)):
            data = piece[: size - start]
            digest.update(data)
            yield data

    before = resident()
    answer = server.client.put(url_of(box), params={"path": "/large"}, content=body())
    assert answer.json()["data"]["size"] == size, answer.text
    back, most = hashlib.sha256(), 0
    with server.client.stream("GET", url_of(box), params={"path": "/large"}) as stream:
        for data in stream.iter_bytes():
            back.update(data)
            most = max(most, resident())
    assert back.digest() == digest.digest()
    assert most - before < 60
    server.execute(box, "rm /large")


@pytest.mark.whole_memory
def test_many_at_once_and_none_left(server: RealServer, box: str) -> None:
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda n: put(server, box, f"/tmp/many/{n}", b"%d" % n), range(48)))
        found = list(threads.map(lambda n: read(server, box, f"/tmp/many/{n}").content, range(48)))
    assert found == [b"%d" % number for number in range(48)]
    assert said(server, box, "ls /tmp/many | wc -l") == "48"
    zombies = "cat /proc/[0-9]*/stat 2>/dev/null | awk '$3 == \"Z\"' | wc -l"
    wait_until(lambda: said(server, box, zombies) == "0")


@pytest.mark.parametrize("many", [3000, pytest.param(20_000, marks=pytest.mark.long)])
def test_a_watched_folder_tells_what_is_done_in_it(server: RealServer, box: str, many: int) -> None:
    said(server, box, "mkdir -p /tmp/w/deep; touch /tmp/w/there")
    query = {"path": "/tmp/w", "recursive": "true"}
    heard: list[dict[str, Any]] = []
    with server.client.stream("GET", url_of(box, "watch"), params=query) as stream:
        events = events_of(stream.iter_lines())
        said(server, box, "cd /tmp/w; echo x > deep/new; mv there gone; mkdir -p a/b; "
                          "echo y > a/b/c; rm deep/new; chmod 700 a; touch last")  # fmt: skip
        while not heard or heard[-1].get("path") != "/tmp/w/last":
            heard.append(next(events)[2])
        told = [(one["type"], one["path"].removeprefix("/tmp/w/")) for one in heard]
        for one in (
            ("created", "deep/new"), ("moved", "gone"), ("created", "a"), ("created", "a/b"),
            ("created", "a/b/c"), ("removed", "deep/new"), ("attributes", "a"),
        ):  # fmt: skip
            assert told.count(one) == 1, (one, told)
        # Of very many something is told all the same, and in the end that it is gone.
        done = server.execute(
            box, f"cd /tmp/w && seq {some(many)} | xargs touch; cd /; rm -r /tmp/w", timeout=240_000
        )
        assert not done["timedOut"]
        count, last = 0, heard[-1]
        while "code" not in last:
            name, _, last = next(events)
            count += name == "overflow" or last.get("type") == "created"
        assert last["details"] == {"reason": "absent"}
        assert count > 0
    refused = server.client.get(url_of(box, "watch"), params={"path": "/tmp/none"})
    assert refused.status_code == 404
    denied = {"path": "/root", "user": "nobody"}
    assert server.client.get(url_of(box, "watch"), params=denied).status_code == 403
    # Who goes away is not watched for: nothing of it is left in the sandbox.
    with server.client.stream("GET", url_of(box, "watch"), params={"path": "/tmp"}):
        pass
    watches = "cat /proc/*/fdinfo/* 2>/dev/null | grep -c '^inotify'"
    wait_until(lambda: said(server, box, watches) in ("0", ""))


def test_a_signed_url_needs_no_key(server: RealServer, box: str) -> None:
    def sign(**wanted: str) -> str:
        answer = server.client.post(url_of(box, "sign"), json=wanted)
        return str(answer.json()["data"]["url"])

    put(server, box, "/tmp/signed", b"for all")
    with httpx.Client(timeout=longer(30)) as anybody:
        url = sign(path="/tmp/signed")
        assert anybody.get(url).content == b"for all"
        assert anybody.put(url, content=b"x").status_code == 401
        url = sign(path="/tmp/given", method="PUT", user="nobody")
        assert anybody.put(url, content=b"given").status_code == 201
    assert said(server, box, "stat -c %U /tmp/given; cat /tmp/given") == "nobody\ngiven"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("files", ["hello", '"url":"http', "event: change"]),
        ("processes", ['"tag":"counter"', "event: exit"]),
    ],
)
def test_a_page_works_as_it_is_pasted(
    server: RealServer, box: str, page: str, words: list[str]
) -> None:
    text = (Path(__file__).parents[2] / f"docs/howto/{page}.md").read_text()
    script = "\n".join(one.split("```")[0] for one in text.split("```sh\n")[1:])
    if is_slow():
        script = re.sub(
            r"\b(timeout|sleep) (\d+)", lambda one: f"{one[1]} {longer(int(one[2])):g}", script
        )
    config = (server.home / "xdg/sandyard/config.toml").read_text()
    key = config.split('api_key = "')[1].split('"')[0]
    environment = {**os.environ, "URL": f"http://127.0.0.1:{server.port}", "KEY": key}
    done = subprocess.run(
        ["bash", "-euc", script.replace("/first/", f"/{box}/")], env=environment,
        capture_output=True, text=True, check=False, cwd=server.home,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for word in words:
        assert word in done.stdout, done.stdout
