"""Drives every public method of E2B's Python SDK against a server, with the SDK's own Python.

    python drive.py sync|async TEMPLATE [METHOD...]

The server and the key are in the SDK's environment variables. It prints one line of JSON for each
method, or for those that are named: what came of it. It imports nothing of this repository, and is
typed for none: the two SDKs have different types.
"""

import asyncio
import inspect
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import e2b  # type: ignore[import-not-found]  # where it runs, it is there

IS_ASYNC = sys.argv[1] == "async"
TEMPLATE = sys.argv[2]
ONLY = set(sys.argv[3:])
HAS_NAMES = "E2B_SANDBOX_URL" not in os.environ
"""Whether sandboxes have host names of their own, which only a domain gives them."""
Sandbox: Any = e2b.AsyncSandbox if IS_ASYNC else e2b.Sandbox
Check = Callable[[Any], Awaitable[None]]
CHECKS: dict[str, Check] = {}


def check(*names: str, needs_names: bool = False) -> Callable[[Check], Check]:
    """Declare which methods a check drives; `needs_names` of those that only a domain has."""

    def mark(work: Check) -> Check:
        for name in names:
            CHECKS[name] = unnamed if needs_names and not HAS_NAMES else work
        return work

    return mark


async def unnamed(box: Any) -> None:
    """Stand for a check of what a URL without a domain cannot do."""


async def done(found: Any) -> Any:
    """Return a result of either SDK."""
    return await found if inspect.isawaitable(found) else found


async def error_of(work: Callable[[], Any]) -> Any:
    """Return the error of a call; None if it has none."""
    try:
        await done(work())
    except Exception as error:  # noqa: BLE001 - whatever the SDK makes of it
        return error
    return None


async def refused(work: Callable[[], Any], *words: str) -> None:
    """Fail unless a call is refused, in words."""
    error = await error_of(work)
    assert error is not None, "it was not refused"
    assert all(word in str(error) for word in words), error


async def until(condition: Callable[[], Any], limit_s: float = 60) -> None:
    until_s = time.monotonic() + limit_s
    while not await done(condition()):
        assert time.monotonic() < until_s, "not in time"
        await asyncio.sleep(0.2)


# --- sandboxes ------------------------------------------------------------------------------


@check("Sandbox.create", "Sandbox.get_info", "Sandbox.list", "Sandbox.is_running", "Sandbox.kill")
async def whole_life(box: Any) -> None:
    made = await done(
        Sandbox.create(TEMPLATE, timeout=99, metadata={"a": "b ü"}, envs={"X": "y z"})
    )
    info = await done(made.get_info())
    assert info.metadata == {"a": "b ü"}
    assert (await done(Sandbox.get_info(made.sandbox_id))).sandbox_id == made.sandbox_id
    assert (info.end_at - info.started_at).total_seconds() >= 99  # from when it runs
    assert info.end_at.timestamp() - time.time() <= 99
    pages = Sandbox.list(query=e2b.SandboxQuery(metadata={"a": "b ü"}), limit=1)
    assert [one.sandbox_id for one in await done(pages.next_items())] == [made.sandbox_id]
    assert await done(made.is_running())
    assert (await done(made.commands.run("echo $X"))).stdout == "y z\n"
    assert await done(made.kill())
    assert not await done(made.is_running())
    assert not await done(Sandbox.kill(made.sandbox_id))


@check("Sandbox.connect", "Sandbox.set_timeout")
async def connecting(box: Any) -> None:
    again = await done(Sandbox.connect(box.sandbox_id, timeout=900))
    assert (await done(again.commands.run("echo again"))).stdout == "again\n"
    await done(box.set_timeout(600))
    info = await done(box.get_info())
    assert 500 < info.end_at.timestamp() - time.time() < 601


@check("Sandbox.pause", "Sandbox.beta_pause")
async def pausing(box: Any) -> None:
    await done(box.commands.run("echo kept > /dev/shm/kept"))
    await done(box.pause())
    assert not await done(box.is_running())
    await done(box.connect())
    assert await done(box.files.read("/dev/shm/kept")) == "kept\n"
    await done(box.beta_pause())
    await done(box.connect(timeout=900))


@check(
    "Sandbox.fork", "Sandbox.create_snapshot", "Sandbox.list_snapshots", "Sandbox.delete_snapshot"
)
async def copies(box: Any) -> None:
    await done(box.files.write("here", "before"))
    snapshot = await done(box.create_snapshot(name="driven"))
    await done(box.files.write("here", "after"))
    found = await done(Sandbox.list_snapshots(sandbox_id=box.sandbox_id).next_items())
    assert snapshot.snapshot_id in [one.snapshot_id for one in found]
    old = await done(Sandbox.create(snapshot.snapshot_id, timeout=600))
    (fork,) = await done(box.fork(timeout=600))
    assert await done(old.files.read("here")) == "before"
    assert await done(fork.files.read("here")) == "after"
    for one in (old, fork):
        await done(one.kill())
    assert await done(Sandbox.delete_snapshot(snapshot.snapshot_id))
    assert not await done(Sandbox.delete_snapshot(snapshot.snapshot_id))


@check("Sandbox.get_metrics")
async def metrics(box: Any) -> None:
    (sample, *_) = await done(box.get_metrics())
    assert sample.cpu_count >= 1
    assert 0 < sample.mem_used < sample.mem_total


@check("Sandbox.get_host", needs_names=True)
async def ports(box: Any) -> None:
    await done(box.commands.run("mkdir -p /tmp/www; echo shown > /tmp/www/page"))
    serving = await done(
        box.commands.run("cd /tmp/www; exec python3 -m http.server 8000", background=True)
    )
    url = f"https://{box.get_host(8000)}/page"

    def status() -> int:
        error = None
        try:
            return int(urllib.request.urlopen(url, timeout=20).status)
        except urllib.error.HTTPError as found:
            error = found
        return error.code

    await until(lambda: status() == 200)
    assert urllib.request.urlopen(url, timeout=20).read() == b"shown\n"
    await done(serving.kill())


@check("Sandbox.download_url", "Sandbox.upload_url", needs_names=True)
async def signed_urls(box: Any) -> None:
    url = await done(box.upload_url("up", use_signature_expiration=60))
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="up"\r\n\r\nup\r\n--x--\r\n'
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
    assert await done(box.files.read("up")) == "up"
    url = await done(box.download_url("up"))
    assert urllib.request.urlopen(url, timeout=60).read() == b"up"
    error = await error_of(lambda: urllib.request.urlopen(url.replace("up", "other"), timeout=60))
    assert error.code == 401, error


@check("Sandbox.update_network")
async def network(box: Any) -> None:
    await done(box.update_network({"allow_out": ["a.test"], "deny_out": ["0.0.0.0/0"]}))
    resolving = "getent hosts b.test || echo none"
    assert "none" in (await done(box.commands.run(resolving))).stdout
    await refused(lambda: box.update_network({"allow_out": ["a.test"]}), "network.allowOut")
    await done(box.update_network({}))


@check("Sandbox.get_mcp_url", "Sandbox.get_mcp_token")
async def mcp(box: Any) -> None:
    assert str(box.mcp_port) in await done(box.get_mcp_url())
    # Where the gateway that E2B's template for MCP has keeps it.
    folder = "/etc/mcp-gateway"
    command = f"mkdir -p {folder}; printf token > {folder}/.token"
    await done(box.commands.run(command, user="root"))
    assert await done(box.get_mcp_token()) == "token"


# --- commands -------------------------------------------------------------------------------


@check("Commands.run", "CommandHandle.wait")
async def commands(box: Any) -> None:
    told = await done(
        box.commands.run(
            "echo out; echo err >&2; pwd; echo $A", cwd="/tmp", envs={"A": "ü 'q'"}, user="root"
        )
    )
    assert (told.stdout, told.stderr, told.exit_code) == ("out\n/tmp\nü 'q'\n", "err\n", 0)
    assert (await done(box.commands.run("whoami; pwd"))).stdout == "user\n/home/user\n"
    error = await error_of(lambda: box.commands.run("exit 7"))
    assert error.exit_code == 7, error
    lines: list[str] = []
    handle = await done(box.commands.run("for i in 1 2 3; do echo $i; done", background=True))
    if IS_ASYNC:
        found = await handle.wait()
        lines.append(found.stdout)
    else:
        handle.wait(on_stdout=lines.append)
    assert "".join(lines) == "1\n2\n3\n"
    large = await done(box.commands.run("head -c 3000000 /dev/zero | tr '\\0' x"))
    assert large.stdout == "x" * 3_000_000
    await refused(lambda: box.commands.run("sleep 60", timeout=1))
    await refused(lambda: box.commands.run("true", user="ghost"), "ghost")
    await refused(lambda: box.commands.run("true", cwd="/absent"), "/absent")


@check(
    "Commands.list",
    "Commands.connect",
    "Commands.kill",
    "CommandHandle.kill",
    "CommandHandle.pid",
    "CommandHandle.disconnect",
)
async def processes(box: Any) -> None:
    handle = await done(box.commands.run("sleep 60; echo never", background=True))
    listed = await done(box.commands.list())
    assert handle.pid in [one.pid for one in listed]
    other = await done(box.commands.connect(handle.pid))
    assert other.pid == handle.pid
    await done(other.disconnect())
    assert await done(handle.kill())
    await refused(handle.wait)
    assert not await done(box.commands.kill(4_000_000))
    again = await done(box.commands.run("sleep 60", background=True))
    assert await done(box.commands.kill(again.pid))


@check(
    "Commands.send_stdin",
    "Commands.close_stdin",
    "Commands.stream_input",
    "CommandHandle.send_stdin",
    "CommandHandle.close_stdin",
)
async def standard_input(box: Any) -> None:
    handle = await done(box.commands.run("cat", background=True, stdin=True))
    await done(box.commands.send_stdin(handle.pid, "one "))
    if hasattr(box.commands, "stream_input"):
        await streamed(box.commands, handle.pid, "two ")
    else:
        await done(box.commands.send_stdin(handle.pid, "two "))
    if hasattr(handle, "send_stdin"):
        await done(handle.send_stdin("three"))
        await done(handle.close_stdin())
    else:
        await done(box.commands.send_stdin(handle.pid, "three"))
        await done(box.commands.close_stdin(handle.pid))
    assert (await done(handle.wait())).stdout == "one two three"


async def streamed(module: Any, pid: int, text: str) -> None:
    """Send input by the method that opens a stream for it."""
    if not IS_ASYNC:
        module.stream_input(pid, iter(text))
        return
    stream = module.stream_input(pid)
    for one in text:
        await stream.send(one)
    await stream.close()


@check("Pty.create", "Pty.connect", "Pty.resize", "Pty.send_stdin", "Pty.kill", "Pty.stream_input")
async def terminals(box: Any) -> None:
    output: list[bytes] = []
    more = {"on_data": output.append} if IS_ASYNC else {}
    handle = await done(box.pty.create(e2b.PtySize(rows=24, cols=80), **more))
    await done(box.pty.resize(handle.pid, e2b.PtySize(rows=33, cols=99)))
    again = await done(box.pty.connect(handle.pid, **more))
    await done(box.pty.send_stdin(handle.pid, b"stty size; "))
    if hasattr(box.pty, "stream_input"):
        await streamed(box.pty, handle.pid, "exit\n")
    else:
        await done(box.pty.send_stdin(handle.pid, b"exit\n"))
    if IS_ASYNC:
        await again.wait()
        await handle.wait()
    else:
        handle.wait(on_pty=output.append)
        await done(again.disconnect())
    assert b"33 99" in b"".join(output), output
    other = await done(box.pty.create(e2b.PtySize(rows=24, cols=80), **more))
    assert await done(box.pty.kill(other.pid))


# --- files ----------------------------------------------------------------------------------


@check("Filesystem.write", "Filesystem.read", "Filesystem.write_files")
async def contents(box: Any) -> None:
    told = await done(box.files.write("a/b.txt", "tëxt", metadata={"k": "v"}))
    assert told.path == "/home/user/a/b.txt"
    assert await done(box.files.read("a/b.txt")) == "tëxt"
    assert await done(box.files.read("~/a/b.txt", format="bytes")) == "tëxt".encode()
    data = bytes(range(256)) * 4000
    for more in ({}, {"gzip": True}, {"use_octet_stream": True}):
        await done(box.files.write("/tmp/data", data, **more))
        assert await done(box.files.read("/tmp/data", format="bytes")) == data
    await done(box.files.write("/tmp/io", io.BytesIO(data)))
    stream = await done(box.files.read("/tmp/io", format="stream"))
    found = b""
    if IS_ASYNC:
        async for piece in stream:
            found += piece
    else:
        for piece in stream:
            found += piece
    assert found == data
    many = [{"path": f"/tmp/many/{one}", "data": str(one)} for one in range(10)]
    written = await done(box.files.write_files(many))
    assert [one.path for one in written] == [one["path"] for one in many]
    owner = await done(box.commands.run("stat -c '%U %a' a a/b.txt /tmp/data"))
    assert owner.stdout == "user 755\nuser 644\nuser 644\n"
    assert (await done(box.files.read("/proc/version"))).startswith("Linux")


@check(
    "Filesystem.list",
    "Filesystem.exists",
    "Filesystem.get_info",
    "Filesystem.make_dir",
    "Filesystem.rename",
    "Filesystem.remove",
)
async def trees(box: Any) -> None:
    assert await done(box.files.make_dir("tree/deep"))
    assert not await done(box.files.make_dir("tree/deep"))
    await done(box.files.write("tree/deep/file", "1"))
    await done(box.commands.run("ln -s deep tree/link; ln -s nowhere tree/broken"))
    listed = await done(box.files.list("tree", depth=2))
    names = [one.path.removeprefix("/home/user/tree/") for one in listed]
    assert names[:2] == ["deep", "deep/file"], names
    link = await done(box.files.get_info("tree/link"))
    assert (link.type.value, link.symlink_target) == ("dir", "/home/user/tree/deep")
    assert link.permissions.startswith("L")
    info = await done(box.files.get_info("tree/deep/file"))
    assert (info.size, info.mode, info.owner) == (1, 0o644, "user")
    assert await done(box.files.exists("tree/deep/file"))
    assert not await done(box.files.exists("tree/absent"))
    moved = await done(box.files.rename("tree/deep/file", "tree/new/place"))
    assert moved.path == "/home/user/tree/new/place"
    await done(box.files.remove("tree"))
    assert not await done(box.files.exists("tree"))
    await refused(lambda: box.files.list("tree"))
    await refused(lambda: box.files.read("tree"))


@check("Filesystem.watch_dir")
async def watching(box: Any) -> None:
    await done(box.files.make_dir("watched/sub"))
    events: list[Any] = []
    if IS_ASYNC:
        handle = await box.files.watch_dir("watched", events.append, recursive=True)
    else:
        handle = box.files.watch_dir("watched", recursive=True)
    await done(box.files.write("watched/sub/a", "1"))
    await done(box.files.rename("watched/sub/a", "watched/b"))
    await done(box.files.remove("watched/b"))

    def seen() -> bool:
        if not IS_ASYNC:
            events.extend(handle.get_new_events())
        return any(one.type.value == "remove" for one in events)

    await until(lambda: seen())
    told = [(one.name, one.type.value) for one in events]
    assert told == [
        ("sub/a", "create"), ("sub/a", "chmod"), ("sub/a", "write"), ("sub/a", "rename"),
        ("b", "create"), ("b", "remove"),
    ], told  # fmt: skip
    await done(handle.stop())
    if not IS_ASYNC:
        box.commands.run("mkdir watched/many; cd watched/many; touch $(seq 1 5000)")
        handle = box.files.watch_dir("watched", recursive=True)
        box.commands.run("cd watched/many; for i in $(seq 1 10000); do : > new-$i; done")
        assert len(handle.get_new_events()) >= 10_000
        handle.stop()


# --- git ------------------------------------------------------------------------------------


@check(
    "Git.init",
    "Git.add",
    "Git.commit",
    "Git.status",
    "Git.branches",
    "Git.create_branch",
    "Git.checkout_branch",
    "Git.delete_branch",
    "Git.configure_user",
    "Git.set_config",
    "Git.get_config",
    "Git.reset",
    "Git.restore",
)
async def repository(box: Any) -> None:
    git = box.git
    await done(git.init("repo", initial_branch="main"))
    await done(git.configure_user("Somebody", "some@example.org", scope="local", path="repo"))
    await done(git.set_config("core.editor", "true", scope="local", path="repo"))
    found = await done(git.get_config("core.editor", scope="local", path="repo"))
    assert found.strip() == "true"
    await done(box.files.write("repo/file", "1"))
    assert [one.name for one in (await done(git.status("repo"))).file_status] == ["file"]
    await done(git.add("repo"))
    await done(git.commit("repo", "first"))
    await done(git.create_branch("repo", "other"))
    await done(git.checkout_branch("repo", "main"))
    assert set((await done(git.branches("repo"))).branches) == {"main", "other"}
    await done(git.delete_branch("repo", "other", force=True))
    await done(box.files.write("repo/file", "2"))
    await done(git.restore("repo", ["file"]))
    assert await done(box.files.read("repo/file")) == "1"
    await done(git.reset("repo", mode="hard"))


@check("Git.clone", "Git.push", "Git.pull", "Git.remote_add", "Git.remote_get")
async def remotes(box: Any) -> None:
    git = box.git
    await done(box.commands.run("git init -q --bare /tmp/far.git"))
    await done(git.init("near", initial_branch="main"))
    await done(git.configure_user("Somebody", "some@example.org"))
    await done(box.files.write("near/file", "1"))
    await done(git.add("near"))
    await done(git.commit("near", "first"))
    await done(git.remote_add("near", "origin", "/tmp/far.git"))
    assert (await done(git.remote_get("near", "origin"))).strip() == "/tmp/far.git"
    await done(git.push("near", remote="origin", branch="main"))
    await done(git.clone("/tmp/far.git", "copy", branch="main"))
    assert await done(box.files.read("copy/file")) == "1"
    await done(git.pull("copy", remote="origin", branch="main"))


@check("Git.dangerously_authenticate")
async def credentials(box: Any) -> None:
    await done(
        box.git.dangerously_authenticate(
            username="somebody", password="secret", host="git.example.org"
        )
    )
    kept = await done(box.commands.run("cat ~/.git-credentials"))
    assert "somebody:secret@git.example.org" in kept.stdout


# --- what there is --------------------------------------------------------------------------

_NO_METHODS = {
    "Sandbox.commands", "Sandbox.files", "Sandbox.git", "Sandbox.pty",
    "Sandbox.connection_config", "Sandbox.default_mcp_template",
    "Sandbox.default_sandbox_timeout", "Sandbox.default_template", "Sandbox.envd_api_url",
    "Sandbox.envd_direct_url", "Sandbox.mcp_port", "Sandbox.sandbox_domain", "Sandbox.sandbox_id",
    "Sandbox.traffic_access_token", "CommandHandle.error", "CommandHandle.exit_code",
    "CommandHandle.stderr", "CommandHandle.stdout",
}  # fmt: skip


def methods(box: Any, handle: Any) -> list[str]:
    """Return the names of all public methods of what is driven."""
    classes = {
        "Sandbox": type(box), "Commands": type(box.commands), "Pty": type(box.pty),
        "Filesystem": type(box.files), "Git": type(box.git), "CommandHandle": type(handle),
    }  # fmt: skip
    names = {f"{name}.{one}" for name, kind in classes.items() for one in dir(kind)}
    return sorted(one for one in names if "._" not in one and one not in _NO_METHODS)


def tell(name: str, what: str) -> None:
    """Report what came of a method."""
    sys.stdout.write(json.dumps({"method": name, "outcome": what}) + "\n")


async def main() -> None:
    """Drive all of them, in one sandbox."""
    box = await done(Sandbox.create(TEMPLATE, timeout=900))
    outcome: dict[Check, str] = {}
    try:
        handle = await done(box.commands.run("true", background=True))
        await done(handle.wait())
        for name in methods(box, handle):
            if ONLY and name not in ONLY:
                continue
            work = CHECKS.get(name)
            if work is None:
                tell(name, "not driven")
                continue
            if work not in outcome:
                began = time.monotonic()
                try:
                    await asyncio.wait_for(work(box), 300)
                    outcome[work] = "needs a domain" if work is unnamed else "works"
                except Exception as error:  # noqa: BLE001 - it is reported
                    outcome[work] = f"failed: {type(error).__name__}: {error}"[:2000]
                taken = round(time.monotonic() - began, 1)
                sys.stderr.write(f"{work.__name__}: {outcome[work]} ({taken} s)\n")
            tell(name, outcome[work])
    finally:
        await done(box.kill())


asyncio.run(main())
sys.stdout.flush()
sys.stderr.flush()
# The SDK's HTTP client has threads of native code, which may abort an interpreter that shuts down.
os._exit(0)
