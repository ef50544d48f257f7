"""Workspaces mounted in real machines: live both ways, over every change, and against attackers."""

import json
import os
import shlex
import signal
import subprocess
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.firecracker import WITHOUT_WHOLE_MEMORY, has_test_kernel
from tests.support.ports import free_port
from tests.support.server import RealServer, is_slow, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.whole_memory]

NFS = Path(__file__).parents[1] / "support/nfs.py"
GATEWAY = "172.16.0.1"


@pytest.fixture(scope="module")
def yard(hypervisor: dict[str, str]) -> Iterator[RealServer]:
    """An installation of its own: file servers stay for a while, and others count what is there."""
    if has_test_kernel(hypervisor):
        pytest.skip(WITHOUT_WHOLE_MEMORY)
    made = RealServer(
        free_port(), **hypervisor, SANDYARD_POOL__CEILING="2", SANDYARD_WORKSPACES__QUOTA_MIB="256"
    )
    made.share_goldens()
    disk = made.home / "workspaces"  # a disk of their own, to be filled
    disk.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9g,mode=0700", "tmpfs", disk], check=True)
    # What is unmounted in it is unmounted in the namespaces of other tests as well.
    subprocess.run(["mount", "--make-shared", disk], check=True)
    try:
        try:
            made.start()
            wait_until(lambda: len(made.waiting()) == 2, limit_s=120, what="the pool is full")
            yield made
        finally:
            if made.process is not None and made.process.poll() is None:
                made.stop()
            made.run("stop", "--all", check=False)
            subprocess.run(["umount", disk], check=True)
    finally:
        made.remove()


@pytest.fixture
def work(yard: RealServer) -> Iterator[str]:
    made = yard.client.post("/v1/workspaces", json={"name": "Work"}).json()["data"]["id"]
    yield made
    yard.client.delete(f"/v1/workspaces/{made}", params={"force": "true"})


@pytest.fixture
def boxes(yard: RealServer) -> Iterator[list[str]]:
    made: list[str] = []
    yield made
    for one in made:
        yard.delete(one)


def a_box(
    yard: RealServer, boxes: list[str], *mounts: tuple[str, str], read_only: bool = False
) -> str:
    wanted = [{"workspaceId": one, "path": path, "readOnly": read_only} for one, path in mounts]
    box = str(yard.create(mounts=wanted)["id"])
    boxes.append(box)
    return box


def said(yard: RealServer, box: str, command: str, **more: object) -> str:
    """Run a command away from what is mounted, and return what it printed."""
    done = yard.execute(box, command, cwd="/", **more)
    return f"{done['stdout']}{done['stderr']}"


def upload(yard: RealServer, work: str, name: str, data: bytes) -> None:
    yard.client.post(
        f"/v1/workspaces/{work}/upload", files={"file": (name, data)}
    ).raise_for_status()


def content(yard: RealServer, work: str, name: str) -> bytes:
    answer = yard.client.get(f"/v1/workspaces/{work}/direct", params={"id": f"/{name}"})
    assert answer.is_success, answer.text
    return answer.content


def ganesha_of(yard: RealServer, box: str) -> int:
    """Return the process of a machine's one file server."""
    slot = yard.record_of(box)["slot"]
    (told,) = yard.home.glob(f"exports/{slot}-*/server.json")
    return int(json.loads(told.read_text())["pid"])


def test_a_workspace_is_live_between_the_api_and_two_machines(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    upload(yard, work, "from-api", b"one")
    first, second = (a_box(yard, boxes, (work, "/workspace")) for _ in range(2))
    assert said(yard, first, "cat /workspace/from-api") == "one"
    for n in range(5):  # nothing that is cached is used unasked, also of what is there already
        upload(yard, work, "from-api", f"again {n}".encode())
        assert said(yard, first, "cat /workspace/from-api") == f"again {n}"
        said(yard, second, f"echo second {n} > /workspace/seen; rm -f /workspace/gone")
        assert said(yard, first, "cat /workspace/seen; touch /workspace/gone") == f"second {n}\n"
        assert content(yard, work, "seen") == f"second {n}\n".encode()
    # A lock of one machine keeps the other out, and goes with its holder.
    said(yard, first, "flock /workspace/lock sleep 600 >/dev/null 2>&1 & sleep 0.5")
    assert said(yard, second, "flock -n /workspace/lock echo mine || echo taken") == "taken\n"
    # Who waits for a lock has it when its holder lets it go, or goes.
    for kind in ("lockf", "flock"):
        opens = f"import fcntl, os, time; f = open('/workspace/{kind}', 'w')"
        takes = f"fcntl.{kind}(f, fcntl.LOCK_EX)"
        held = "open('/tmp/held', 'w')\nwhile not os.path.exists('/tmp/free'): time.sleep(0.1)"
        asked = f"print('asked', flush=True); {takes}; print('mine')"
        holds, waits = (shlex.quote(f"{opens}; {one}") for one in (f"{takes}; {held}", asked))
        tries = shlex.quote(f"{opens}; {takes.replace('EX', 'EX | fcntl.LOCK_NB')}")
        said(yard, first, f"rm -f /tmp/free /tmp/held; python3 -c {holds} >/dev/null 2>&1 &")
        wait_until(lambda: "held" in said(yard, first, "ls /tmp"), what="the lock is held")
        assert "BlockingIOError" in said(yard, second, f"python3 -c {tries} 2>&1 | tail -1")
        said(yard, second, f"python3 -c {waits} >/tmp/waits 2>&1 &")
        wait_until(
            lambda: said(yard, second, "cat /tmp/waits") == "asked\n", what="it is asked for"
        )
        said(yard, first, "touch /tmp/free")
        wait_until(lambda: said(yard, second, "cat /tmp/waits") == "asked\nmine\n", what="its turn")
    said(yard, second, "flock /workspace/lock date >/tmp/waited 2>&1 & sleep 0.5")
    yard.delete(first)
    boxes.remove(first)
    wait_until(lambda: "20" in said(yard, second, "cat /tmp/waited"), limit_s=90, what="its turn")
    wait_until(
        lambda: said(yard, second, "flock -n /workspace/lock echo mine || true") == "mine\n",
        limit_s=60, what="the lock of a machine that is gone is free",
    )  # fmt: skip


def test_files_behave_and_a_full_workspace_says_so(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    box = a_box(yard, boxes, (work, "/workspace/deep/down"))
    script = """
        cd /workspace/deep/down
        python3 - <<'E'
        import fcntl, os, sqlite3, time, multiprocessing as m
        db = sqlite3.connect("db")
        db.execute("create table t(n)")
        for n in range(20):
            with db: db.execute("insert into t values (?)", (n,))
        print(db.execute("select sum(n) from t").fetchone()[0])
        def write(k):
            with open("all", "ab", buffering=0) as f:
                for n in range(50):
                    while True:
                        try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); break
                        except BlockingIOError: time.sleep(0.005)
                    f.seek(0, 2); f.write(b"%d %d\\n" % (k, n)); fcntl.flock(f, fcntl.LOCK_UN)
        with m.Pool(4) as pool: pool.map(write, range(4))
        lines = open("all", "rb").read().split(b"\\n")[:-1]
        print(len(lines), len(set(lines)))
        os.symlink("db", "link"); os.link("db", "hard"); os.rename("hard", "moved")
        os.mkfifo("pipe"); os.chown("moved", 1000, 1000); os.chmod("moved", 0o4711)
        s = os.stat("moved"); print(oct(s.st_mode), s.st_uid, s.st_nlink, os.readlink("link"))
        os.makedirs("a/" * 30 + "z"); open(b"\\xff\\n\\xc3\\xa9", "w").close()
        f = open("sparse", "wb"); f.truncate(1 << 33); f.seek(1 << 32); f.write(b"x"); f.close()
        print(os.stat("sparse").st_size, os.stat("sparse").st_blocks * 512 < 1 << 20)
        E
        df -B1 --output=size . | tail -1
        """
    lines = said(yard, box, textwrap.dedent(script), timeout=120_000).split("\n")
    assert lines[:4] == ["190", "200 200", "0o104711 1000 2 db", "8589934592 True"], lines
    # It has its own size, whatever the host has.
    assert 256 * 2**20 <= int(lines[4]) <= 300 * 2**20
    listing = yard.client.get(f"/v1/workspaces/{work}/files").json()
    assert {"db", "all", "sparse", "moved"} <= {one["id"].strip("/") for one in listing}
    full = (
        "cd /workspace/deep/down && echo still here > small; head -c 400M /dev/zero > big; "
        "rm -f big; echo and here >> small"
    )
    assert "No space left" in said(yard, box, full, timeout=240_000)
    assert content(yard, work, "small") == b"still here\nand here\n"


def test_a_file_that_is_open_is_opened_again_for_what_its_mode_allows(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    box = a_box(yard, boxes, (work, "/workspace"))
    script = """
        python3 - <<'E'
        import os
        from os import O_RDONLY as R, O_RDWR as RW, O_TRUNC as T, O_WRONLY as W
        def opened(name, flags):
            try: os.close(os.open("/workspace/" + name, flags)); return "open"
            except OSError as error: return error.strerror
        open("/workspace/roots", "w").write("precious"); os.chmod("/workspace/roots", 0o644)
        os.setgid(1000); os.setuid(1000)
        made = os.open("/workspace/pack", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o444)
        os.write(made, b"as git makes them")
        print(opened("pack", R))
        os.write(made, b", on and on")
        os.close(made)
        print(*(opened("pack", one) for one in (R, W, RW)))
        held = os.open("/workspace/roots", R)
        print(*(opened("roots", one) for one in (R, W, RW, R | T)))
        E
        """
    refused = "Permission denied"
    assert said(yard, box, textwrap.dedent(script)).splitlines() == [
        "open", f"open {refused} {refused}", f"open {refused} {refused} {refused}",
    ]  # fmt: skip
    assert content(yard, work, "pack") == b"as git makes them, on and on"


def test_what_is_read_only_and_what_is_not_granted_stays_so(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    other = yard.client.post("/v1/workspaces", json={"name": "Other"}).json()["data"]["id"]
    upload(yard, work, "secret", b"of the first")
    upload(yard, other, "secret", b"of the second")
    owner = a_box(yard, boxes, (other, "/workspace"))
    said(yard, owner, "chmod 600 /workspace/secret; ls -l /workspace")
    reader = a_box(yard, boxes, (work, "/workspace"), read_only=True)
    stranger = a_box(yard, boxes)
    assert said(yard, reader, "cat /workspace/secret") == "of the first"
    assert "Read-only" in said(yard, reader, "echo x > /workspace/secret")
    # Root in the guest makes the mount writable for itself, and still writes nothing.
    tried = said(
        yard, reader,
        "mount -o remount,rw /workspace; echo x > /workspace/secret; rm -f /workspace/secret; "
        "chmod 777 /workspace; mkdir /workspace/new",
    )  # fmt: skip
    assert "Read-only" in tried
    assert content(yard, work, "secret") == b"of the first"
    # Its own client speaks to its server, with whatever words.
    port = said(yard, reader, "grep -o 'port=[0-9]*' /proc/mounts").strip().partition("=")[2]
    attack = NFS.read_text() + textwrap.dedent(
        f"""
        import time
        def tell(name, work):
            try: print(name, work())
            except (RefusedError, OSError) as error: print(name, "refused", error)
        def patiently(work):
            for _ in range(100):  # its own server it may end; that is restarted
                try: return work()
                except OSError as error: last = error; time.sleep(0.1)
            raise last
        def opened():
            return patiently(lambda: socket.create_connection(("{GATEWAY}", {port}), 10))
        own, others = b"{work}", b"{other}"
        client = NfsClient(opened(), b"attacker").introduce()
        handle = client.handle_of(own, b"secret")
        tell("own", lambda: client.read_file(handle))
        tell("write", lambda: client.ask([put_handle(handle), write(b"x")]))
        tell("folder", lambda: client.ask(
            [put_root(), look_up(own), make_folder(b"made")]))
        tell("others", lambda: client.handle_of(others))
        tell("others' file", lambda: client.handle_of(others, b"secret"))
        tell("above", lambda: client.handle_of(own, b".."))
        tell("above all", lambda: client.handle_of(b".."))
        # Handles say which export and which file they mean: guess.
        for export in range(8):
            made = handle[:2] + struct.pack(">H", export) + handle[4:]
            if made != handle: tell(f"export {{export}}", lambda: client.read_file(made))
        for number in (2, 8, 11, 12, 14):
            made = bytearray(handle); made[-8:-4] = struct.pack("<I", number)
            tell(f"inode {{number}}", lambda: client.ask([put_handle(bytes(made)), write(b"x")]))
        for length in (0, 1, 4, 16, 64, 128):
            tell(f"noise {{length}}", lambda: client.read_file(os.urandom(length)))
        tell("again", lambda: client.ask([put_handle(handle), read(9)], again=True))
        old = client.session
        client.session = os.urandom(16)
        tell("session", lambda: client.read_file(handle))
        def shout(data):
            with opened() as raw: raw.sendall(data)
        for size in (0, 3, 100, 5000):
            tell("shout", lambda: shout(struct.pack(">I", 0x80000000 | size) + os.urandom(size)))
        tell("shout", lambda: shout(struct.pack(">I", 0x7fffffff) + bytes(100_000)))
        flood = [opened() for _ in range(100)]
        def again():
            client = NfsClient(opened(), b"attacker again").introduce()
            return client.read_file(client.handle_of(own, b"secret"))
        # What the network of machines has accepted, a server that is away resets.
        tell("after all", lambda: patiently(again))
        """
    )
    yard.client.put(
        f"/v1/sandboxes/{reader}/files", params={"path": "/tmp/attack.py"},
        content=attack.encode(),
    )  # fmt: skip
    told = said(yard, reader, "python3 /tmp/attack.py", timeout=120_000)
    lines = dict(one.split(" ", 1) for one in told.splitlines() if " " in one)
    assert lines["own"] == "b'of the first'", told
    assert told.splitlines()[-1] == "after all b'of the first'", told
    for one in told.splitlines():
        if not one.startswith(("own ", "after all", "again", "export", "above ", "shout")):
            assert "refused" in one, told
        assert "of the second" not in one, told
    # Another machine reaches neither this one's server nor any by the addresses of slots.
    outer = str(yard.get(reader)["ip"])
    for box, there in ((stranger, f"{GATEWAY} {port}"), (stranger, f"{outer} {port}"),
                       (owner, f"{GATEWAY} {port}"), (reader, f"{GATEWAY} 2049")):  # fmt: skip
        tried = said(
            yard, box,
            f"timeout 3 bash -c 'exec 3<>/dev/tcp/{there.replace(' ', '/')}' && echo reached",
        )  # fmt: skip
        assert "reached" not in tried, (box, there)
    assert content(yard, other, "secret") == b"of the second"
    yard.delete(owner)
    boxes.remove(owner)
    assert yard.client.delete(f"/v1/workspaces/{other}").status_code == 200


def on_disk(yard: RealServer, work: str) -> dict[str, tuple[object, ...]]:
    """Return what the host sees of a workspace's files."""
    top = yard.home / "workspaces" / work
    found: dict[str, tuple[object, ...]] = {}
    for one in sorted(top.rglob("*")):
        seen = one.stat()
        data = one.read_bytes() if one.is_file() else b""
        found[one.name] = (data, seen.st_mode, seen.st_uid, seen.st_blocks, seen.st_nlink)
    return found


@pytest.mark.parametrize("is_mixed", [False, True])
def test_no_operation_of_nfs_writes_to_what_is_read_only(
    yard: RealServer, work: str, boxes: list[str], is_mixed: bool
) -> None:
    upload(yard, work, "precious", b"p" * 100_000)
    yard.client.put(  # whoever owns it may do most
        f"/v1/workspaces/{work}/files/kept", json={"operation": "write", "contents": "kept"}
    )
    wanted = [{"workspaceId": work, "path": "/workspace/ro", "readOnly": True}]
    own = yard.client.post("/v1/workspaces", json={"name": "Own"}).json()["data"]["id"]
    if is_mixed:
        wanted.append({"workspaceId": own, "path": "/workspace/rw"})
    box = str(yard.create(mounts=wanted)["id"])
    boxes.append(box)
    before = on_disk(yard, work)
    mounted = said(yard, box, "cat /proc/mounts; sha1sum /workspace/ro/precious")
    ports = {one.split(",")[0] for one in mounted.split("port=")[1:]}
    assert len(ports) == 1 + is_mixed
    attack = NFS.read_text() + textwrap.dedent(
        f"""
        def tell(*words): print(*words, flush=True)
        for port in {sorted(ports)}:
          for minor in (0, 1, 2):
            def opened(uid):
                there = socket.create_connection(("{GATEWAY}", port), 10)
                return NfsClient(there, os.urandom(8), uid=uid, minor=minor).introduce()
            for uid in (0, 1000):
                try: client = opened(uid)
                except (RefusedError, OSError) as error:
                    tell("none", port, minor, "refused", error); continue
                for name in (b"precious", b"kept"):
                    try:
                        folder = client.handle_of(b"{work}")
                        file = client.handle_of(b"{work}", name)
                    except RefusedError as error:
                        tell("elsewhere", port, minor, "refused", error); break
                    for what, operation in changing(name).items():
                        for current in (file, folder):
                            try:
                                said = client.ask([put_handle(folder), save_handle(),
                                                   put_handle(current), operation])
                            except RefusedError as error: tell(what, minor, uid, "refused", error)
                            except OSError as error:
                                tell(what, minor, uid, "refused, and gone", error)
                                client = opened(uid)
                            else: tell(what, minor, uid, "done")
                    tell("read", minor, uid, client.read_file(file, 4))
        """
    )
    path = {"path": "/tmp/attack.py"}
    yard.client.put(f"/v1/sandboxes/{box}/files", params=path, content=attack.encode())
    told = said(yard, box, "python3 /tmp/attack.py", timeout=300_000)
    lines = told.splitlines()
    assert "Traceback" not in told, told
    assert sum("read 2 0 b'pppp'" in one for one in lines) == 1, told
    assert sum("read 1 1000 b'kept'" in one for one in lines) == 1, told
    assert {one.split()[0] for one in lines} >= {"ALLOCATE", "DEALLOCATE", "SETATTR", "WRITE"}
    # Whatever was answered, nothing has come of it.
    assert on_disk(yard, work) == before, told
    done = {one.split()[0] for one in lines if one.endswith(" done")}
    assert done <= {"LAYOUTGET", "LAYOUTCOMMIT"}, told
    # The kernel itself keeps it, whatever root does in the guest.
    tried = said(
        yard, box,
        "mount -o remount,rw /workspace/ro; cd /workspace/ro; echo x > precious; "
        "fallocate -l 9999999 precious; fallocate -p -o 0 -l 9999 precious; truncate -s 0 kept; "
        "chmod 777 kept; rm kept; mv kept lost; ln kept also; touch new; cat kept",
    )  # fmt: skip
    assert tried.count("Read-only") >= 6, tried
    assert on_disk(yard, work) == before, tried
    yard.delete(box)
    boxes.remove(box)
    yard.client.delete(f"/v1/workspaces/{own}", params={"force": "true"})


def test_what_is_read_only_can_be_locked_for_reading(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    writer = a_box(yard, boxes, (work, "/workspace"))
    reader = a_box(yard, boxes, (work, "/workspace"), read_only=True)
    fill = "import sqlite3; c = sqlite3.connect('/workspace/db'); c.execute('create table t(n)')"
    said(yard, writer, f"python3 -c \"{fill}; c.execute('insert into t values (7)'); c.commit()\"")
    look = (
        "import sqlite3; c = sqlite3.connect('file:/workspace/db?mode=ro', uri=True); "
        "print(c.execute('select * from t').fetchall())"
    )
    assert said(yard, reader, f'python3 -c "{look}"') == "[(7,)]\n"
    holds = "flock -x /workspace/db sh -c 'echo $$ > /tmp/holder; exec sleep 600'"
    said(yard, writer, f"({holds}) >/dev/null 2>&1 & sleep 1")
    shares = "flock -s -n /workspace/db echo shared || echo taken"
    assert said(yard, reader, shares) == "taken\n"
    said(yard, writer, "kill $(cat /tmp/holder)")
    wait_until(lambda: said(yard, reader, shares) == "shared\n", what="the lock is free")


def test_a_machine_cannot_end_the_sessions_of_another(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    """Session ids follow from one's own: the client's number and the session's, counted up."""
    victim = a_writer(yard, boxes, (work, "/workspace"))
    hostile = a_box(yard, boxes, (work, "/workspace"))
    port = said(yard, hostile, "grep -o 'port=[0-9]*' /proc/mounts").strip().partition("=")[2]
    attack = NFS.read_text() + textwrap.dedent(
        f"""
        def opened(): return socket.create_connection(("{GATEWAY}", {port}), 10)
        client = NfsClient(opened(), b"hostile").introduce()
        number, start, count = struct.unpack("<IIQ", client.session)
        ended = []
        other = NfsClient(opened(), b"other")
        for client_number in range(1, 25):
            for session_number in range(0, 25):
                guessed = struct.pack("<IIQ", client_number, start, session_number)
                if guessed == client.session: continue
                try: other.call([bind_to_session(guessed)])
                except RefusedError: continue
                except OSError: other = NfsClient(opened(), b"other"); continue
                try: other.call([destroy_session(guessed)])
                except (RefusedError, OSError): pass
                ended.append((client_number, session_number))
        print(len(ended), ended)
        """
    )
    path = {"path": "/tmp/attack.py"}
    yard.client.put(f"/v1/sandboxes/{hostile}/files", params=path, content=attack.encode())
    told = said(yard, hostile, "python3 /tmp/attack.py", timeout=300_000)
    # Its own kernel's session is all that it can find.
    assert told.startswith("1 "), told
    assert goes_on(yard, victim, work)
    servers = {one.name for one in yard.home.glob("exports/*")}
    assert len(servers) == 2


WRITER = (
    "(exec >/dev/null 2>&1; n=0; while sleep 0.2; do n=$((n+1)); "
    "echo $n > /workspace/new && sync /workspace/new && mv /workspace/new /workspace/n && "
    "sync /workspace && echo $n > /tmp/n; done) & echo started"
)


def a_writer(yard: RealServer, boxes: list[str], *mounts: tuple[str, str]) -> str:
    """Return a machine that writes to the first of the workspaces, without end."""
    box = a_box(yard, boxes, *mounts)
    said(yard, box, "echo 0 > /workspace/n")
    said(yard, box, WRITER)
    assert goes_on(yard, box, mounts[0][0])
    return box


def goes_on(yard: RealServer, box: str, work: str) -> bool:
    """Tell whether what a machine writes comes, and nothing is lost that it was told is there."""
    before = int(content(yard, work, "n") or b"0")
    wait_until(
        lambda: int(content(yard, work, "n") or b"0") > before + 2, limit_s=90,
        what="the machine writes on",
    )  # fmt: skip
    synced = int(said(yard, box, "cat /tmp/n") or "0")
    return int(content(yard, work, "n") or b"0") >= synced > 0


def test_a_mount_survives_pauses_crashes_and_restarts(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    box = a_writer(yard, boxes, (work, "/workspace"))
    yard.client.post(f"/v1/sandboxes/{box}/pause").raise_for_status()
    assert yard.get(box)["status"] == "paused"
    # Meanwhile another workspace is exported, which must not be taken for this one.
    other = yard.client.post("/v1/workspaces", json={"name": "Other"}).json()["data"]["id"]
    beside = a_box(yard, boxes, (other, "/workspace"))
    asker = a_box(yard, boxes, (other, "/workspace"))
    said(yard, beside, "echo other > /workspace/n")
    keeps = (
        "(exec 9>/workspace/locked; flock 9; while sleep 0.3; do date >&9 || echo x >> /tmp/lost; "
        "done) >/dev/null 2>&1 & sleep 1"
    )
    said(yard, beside, keeps)

    def is_held() -> bool:
        at_it = "flock -n /workspace/locked echo free || echo held"
        assert said(yard, beside, "cat /tmp/lost 2>/dev/null") == ""
        return said(yard, asker, at_it) == "held\n"

    assert is_held()
    yard.client.post(f"/v1/sandboxes/{box}/resume").raise_for_status()
    assert goes_on(yard, box, work)
    # The file server ends in the middle, and another takes its place.
    before = ganesha_of(yard, box)
    os.kill(before, signal.SIGKILL)
    assert goes_on(yard, box, work)
    assert ganesha_of(yard, box) != before
    # The server ends in the middle: both live on, and are found again.
    before = ganesha_of(yard, box)
    yard.kill()
    yard.start()
    assert ganesha_of(yard, box) == before
    assert goes_on(yard, box, work)
    assert is_held()
    # In an orderly way, too.
    yard.stop()
    yard.start()
    assert ganesha_of(yard, box) == before
    assert goes_on(yard, box, work)
    assert is_held()
    # Both at once.
    yard.kill()
    os.kill(before, signal.SIGKILL)
    yard.start()
    assert goes_on(yard, box, work)
    assert is_held()
    assert yard.client.post(f"/v1/sandboxes/{box}/restart").status_code == 200
    assert said(yard, box, "cd /workspace && cat n > m && ls m n").split() == ["m", "n"]


def test_a_slot_of_before_leads_to_its_machines_own_server(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    """An earlier version redirected the gateway's port to a file server of the organization."""
    box = a_box(yard, boxes, (work, "/workspace"))
    said(yard, box, "echo kept > /workspace/kept")
    record = yard.record_of(box)
    port = record["mounted"]["port"]
    rules = f"""
        table inet sandyard_share {{
          chain prerouting {{
            type nat hook prerouting priority dstnat; policy accept;
            iifname "tap0" ip daddr {GATEWAY} tcp dport {port} dnat ip to 10.200.0.2:2049
          }}
        }}
        insert rule inet sandyard forward iifname "tap0" tcp dport 2049 ct status dnat accept
        """
    within = ["ip", "netns", "exec", f"{yard.prefix}-{record['slot']}", "nft"]
    subprocess.run([*within, "-f", "-"], input=rules, text=True, check=True)
    os.kill(ganesha_of(yard, box), signal.SIGKILL)  # its next connection is redirected
    look = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{GATEWAY}/{port}' && echo open || echo closed"
    assert said(yard, box, look).endswith("closed\n")
    yard.kill()
    yard.start()
    write = "cat /workspace/kept; echo on > /workspace/on"
    assert said(yard, box, write, timeout=90_000) == "kept\n"
    assert content(yard, work, "on") == b"on\n"
    tables = subprocess.run(
        [*within, "list", "tables"], capture_output=True, text=True, check=True
    ).stdout
    assert "sandyard_share" not in tables


def test_clones_have_mounts_of_their_own(yard: RealServer, work: str, boxes: list[str]) -> None:
    box = a_box(yard, boxes, (work, "/workspace"))
    said(yard, box, "echo kept > /workspace/kept; exec 9>/workspace/open; (sleep 600 >&9) &")
    saved = yard.client.post(f"/v1/sandboxes/{box}/snapshots", json={})
    made = yard.client.post(f"/v1/sandboxes/{box}/fork", json={"count": 2}).json()["data"]
    forks = [str(one["id"]) for one in made]
    boxes += forks
    for fork in forks:
        yard.wait_running(fork, limit_s=60)
        assert said(yard, fork, f"cat /workspace/kept; echo mine > /workspace/{fork}") == "kept\n"
    assert set(said(yard, box, "ls /workspace").split()) == {"kept", "open", *forks}
    clients = {
        one: yard.record_of(one)["mounted"]["client"] for one in (box, *forks)
    }  # fmt: skip
    assert len(set(clients.values())) == 3
    back = yard.client.post(
        f"/v1/sandboxes/{box}/rollback", json={"snapshotId": saved.json()["data"]["id"]}
    )
    assert back.status_code == 200, back.text
    # A workspace is not gone back with: it is no part of the machine.
    assert set(said(yard, box, "cat /workspace/kept; ls /workspace").split()) == {
        "kept", "open", *forks,
    }  # fmt: skip


def test_a_server_that_does_not_see_a_workspace_gives_out_nothing_else(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    other = yard.client.post("/v1/workspaces", json={"name": "Other"}).json()["data"]["id"]
    box = a_box(yard, boxes, (work, "/workspace/work"), (other, "/workspace/other"))
    said(yard, box, "echo kept > /workspace/work/kept")
    before = ganesha_of(yard, box)
    (tree,) = yard.home.glob(f"exports/*/tree/{work}")
    # Unmounted on the host, it goes from the server's view as well, and leaves an empty folder.
    subprocess.run(["umount", "--lazy", tree], check=True)
    gone = yard.client.delete(f"/v1/workspaces/{other}", params={"force": "true"})
    assert gone.status_code == 200, gone.text
    wait_until(lambda: ganesha_of(yard, box) != before, what="the server is restarted")
    assert said(yard, box, "echo on >> /workspace/work/kept; cat /workspace/work/kept") == (
        "kept\non\n"
    )
    assert content(yard, work, "kept") == b"kept\non\n"


def test_a_full_disk_of_the_host_costs_nothing_that_was_synced(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    lost = yard.client.post("/v1/workspaces", json={"name": "Lost"}).json()["data"]["id"]
    box = a_box(yard, boxes, (work, "/workspace/work"), (lost, "/workspace/lost"))
    at_work = "cd /workspace/work; "
    said(yard, box, f"{at_work}head -c 1000000 /dev/urandom > kept; date > open; sync kept open")
    before = said(yard, box, f"{at_work}sha1sum kept")
    said(yard, box, f"{at_work}exec 9>>open; (while sleep 1; do date >&9; done) >/dev/null 2>&1 &")
    disk = yard.home / "workspaces"
    found = os.statvfs(disk)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    subprocess.run(["mount", "-o", f"remount,size={used}", disk], check=True)
    # Whoever writes is told, and in the end the file system lets go rather than to be damaged.
    assert said(yard, box, f"{at_work}head -c 4M /dev/zero > more; sync more || echo told") != ""
    fills = "for i in $(seq 300); do mkdir -p d/$RANDOM$i || break; sync d 2>/dev/null; done"

    def let_go() -> bool:
        told = said(yard, box, f"for w in work lost; do cd /workspace/$w; {fills}; done")
        return told.count("Read-only") == 2

    wait_until(let_go, limit_s=90, what="its file systems let go")
    os.truncate(disk / f"{lost}.ext4", 0)  # what cannot be mended keeps nothing else
    subprocess.run(["mount", "-o", "remount,size=9g", disk], check=True)
    wait_until(
        lambda: said(yard, box, f"{at_work}echo again > new; sync new && echo fine") == "fine\n",
        limit_s=90, what="the workspace takes writes again",
    )  # fmt: skip
    assert said(yard, box, f"{at_work}sha1sum kept") == before
    assert content(yard, work, "new") == b"again\n"
    size = int(said(yard, box, f"{at_work}stat -c %s open"))
    wait_until(
        lambda: int(said(yard, box, f"{at_work}stat -c %s open")) > size,
        what="who had a file open writes on",
    )
    other = a_box(yard, boxes, (work, "/workspace"))
    assert said(yard, other, "cat /workspace/new") == "again\n"
    answer = yard.client.delete(f"/v1/workspaces/{lost}", params={"force": "true"})
    assert answer.status_code in (200, 204), answer.text


def test_a_server_that_hangs_keeps_nobody_but_who_asks_it(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    box = a_box(yard, boxes, (work, "/workspace"))
    said(yard, box, "echo x > /workspace/x")
    hung = ganesha_of(yard, box)
    os.kill(hung, signal.SIGSTOP)
    try:
        said(yard, box, "cat /workspace/x >/tmp/read 2>&1 & echo $! > /tmp/pid")
        assert said(yard, box, "echo fine") == "fine\n"
        refused = yard.client.post(f"/v1/sandboxes/{box}/exec", json={"command": "pwd"})
        assert refused.status_code == 400
        assert "does not answer" in refused.text
        waits = "kill -0 $(cat /tmp/pid) && test ! -s /tmp/read && echo waits"
        assert said(yard, box, waits) == "waits\n"
        gone = "kill -9 $(cat /tmp/pid); sleep 1; kill -0 $(cat /tmp/pid) 2>&1 || echo gone"
        assert "gone" in said(yard, box, gone)
        assert yard.client.post(f"/v1/sandboxes/{box}/pause").status_code == 200
    finally:
        with suppress(ProcessLookupError):  # with its machine's pause it has ended
            os.kill(hung, signal.SIGCONT)
    assert yard.client.post(f"/v1/sandboxes/{box}/resume").status_code == 200
    assert said(yard, box, "cat /workspace/x") == "x\n"


def test_a_delete_by_force_takes_it_away_from_who_writes(
    yard: RealServer, work: str, boxes: list[str]
) -> None:
    kept = yard.client.post("/v1/workspaces", json={"name": "Kept"}).json()["data"]["id"]
    box = a_writer(yard, boxes, (work, "/workspace"), (kept, "/workspace/in/kept"))
    answer = yard.client.delete(f"/v1/workspaces/{work}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "WORKSPACE_IN_USE")
    answer = yard.client.delete(f"/v1/workspaces/{work}", params={"force": "true"})
    assert answer.status_code == 200, answer.text
    wait_until(
        lambda: not list((yard.home / "workspaces").glob(f"{work}*")), limit_s=90,
        what="nothing of the workspace is left",
    )  # fmt: skip
    # What lay in it, of another workspace, is there still.
    assert said(yard, box, "grep -o '[^ ]* nfs4' /proc/mounts") == "/workspace/in/kept nfs4\n"
    said(yard, box, "echo kept > /workspace/in/kept/file")
    assert content(yard, kept, "file") == b"kept\n"
    assert said(yard, box, "echo fine > /tmp/fine; cat /tmp/fine") == "fine\n"
    if not is_slow():
        body = {"template": "base-minimal", "mounts": mount_of(work)}
        more = yard.client.post("/v1/sandboxes", json=body)
        assert more.status_code == 400


def mount_of(work: str) -> list[dict[str, Any]]:
    return [{"workspaceId": work, "path": "/workspace"}]


def _wrote(yard: RealServer, one: str) -> bool:
    command = f"hostname > /workspace/{one}"
    answer = yard.client.post(f"/v1/sandboxes/{one}/exec", json={"command": command, "cwd": "/"})
    if answer.status_code == 503 or "does not answer" in answer.text:
        return False
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["exitCode"] == 0
    return True


def test_attributes_that_may_be_cached_are_and_contents_are_current(
    hypervisor: dict[str, str],
) -> None:
    if has_test_kernel(hypervisor):
        pytest.skip(WITHOUT_WHOLE_MEMORY)
    cached = {"SANDYARD_WORKSPACES__ATTRIBUTE_CACHE_S": "60", "SANDYARD_POOL__CEILING": "0"}
    made = RealServer(free_port(), **hypervisor, **cached)
    made.share_goldens()
    try:
        made.start()
        work = made.client.post("/v1/workspaces", json={"name": "W"}).json()["data"]["id"]
        upload(made, work, "known", b"one")
        box = a_box(made, [], (work, "/workspace"))
        looks = "[os.path.exists('/workspace/known') for _ in range(200)]"
        assert "new" not in said(made, box, f'python3 -c "import os; {looks}"; ls /workspace')
        assert "No such file" in said(made, box, "cat /workspace/new")
        asked = said(made, box, "grep GETATTR: /proc/self/mountstats").split()[1]
        assert int(asked) < 100
        for n in range(3):
            upload(made, work, "known", f"again {n}".encode())
            upload(made, work, f"new{n or ''}", b"here")
            assert said(made, box, "cat /workspace/known") == f"again {n}"
            assert said(made, box, f"cat /workspace/new{n or ''}") == "here"
    finally:
        made.remove()


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.long)])
def test_many_machines_mount_one_workspace_at_once(
    yard: RealServer, work: str, boxes: list[str], count: int
) -> None:
    with ThreadPoolExecutor(count) as threads:
        made = [str(yard.create(wait=0, mounts=mount_of(work))["id"]) for _ in range(count)]
        boxes += made
        list(threads.map(lambda one: yard.wait_running(one, limit_s=300), made))
        # So many emulated machines on two cores: an agent may be told to be silent, for a while.
        list(threads.map(lambda one: wait_until(partial(_wrote, yard, one), limit_s=240), made))
    listing = yard.client.get(f"/v1/workspaces/{work}/files").json()
    assert {one["id"].strip("/") for one in listing} == set(made)
    usage = yard.client.get(f"/v1/workspaces/{work}/usage").json()["data"]
    assert usage["counts"]["mountedSandboxes"] == count
