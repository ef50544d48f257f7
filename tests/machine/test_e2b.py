"""What the agent does for clients of the E2B API, in real machines, without their SDKs."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from tests.support.e2b import STREAM, enveloped, opened
from tests.support.server import RealServer, wait_until

pytestmark = pytest.mark.machine

FILES, PROCESS = "filesystem.Filesystem", "process.Process"


class Caller:
    """A client of the daemon of one sandbox."""

    def __init__(self, server: RealServer, box: str) -> None:
        self._client = server.client
        info = server.client.get(f"/sandboxes/{box}").json()
        self._headers = {
            "E2b-Sandbox-Id": box, "E2b-Sandbox-Port": "49983",
            "X-Access-Token": info["envdAccessToken"],
        }  # fmt: skip

    def call(self, method: str, user: str = "root", **message: Any) -> httpx.Response:
        """Make a call with one answer."""
        basic = "Basic " + base64.b64encode(f"{user}:".encode()).decode()
        headers = {**self._headers, "Content-Type": "application/json", "Authorization": basic}
        return self._client.post(f"/{method}", content=json.dumps(message), headers=headers)

    def run(self, *argv: str, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Run a program, and return its events."""
        message: Mapping[str, Any] = {"process": {"cmd": argv[0], "args": argv[1:]}, **more}
        return self.stream(f"{PROCESS}/Start", message)

    def stream(
        self, method: str, message: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Make a call that is answered by a stream."""
        headers = {**self._headers, "Content-Type": STREAM}
        answer = self._client.post(f"/{method}", content=enveloped(message), headers=headers)
        messages, end = opened(answer.content)
        return [one["event"] for one in messages], end

    def write(self, path: str, data: bytes, *, user: str = "root", **headers: str) -> Any:
        """Write a file, and return what is told of it."""
        answer = self._client.post(
            "/files", params={"path": path, "username": user}, content=data,
            headers={**self._headers, "Content-Type": "application/octet-stream", **headers},
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        return answer.json()[0]


@pytest.fixture
def caller(server: RealServer, box: str) -> Caller:
    return Caller(server, box)


def said(server: RealServer, box: str, command: str) -> str:
    return str(server.execute(box, command)["stdout"]).strip()


def test_paths_begin_in_the_home_of_the_account_that_is_named(
    server: RealServer, box: str, caller: Caller
) -> None:
    said(server, box, "useradd -m -d '/srv/héim' guest 2>/dev/null; mkdir -p /srv/héim; "
         "chown guest /srv/héim")  # fmt: skip
    for path in ("a/b", "~/a/b", "../héim/a/b"):
        told = caller.write(path, b"1", user="guest")
        assert told["path"] == "/srv/héim/a/b"
    assert said(server, box, "stat -c %U /srv/héim/a /srv/héim/a/b") == "guest\nguest"
    entry = caller.call(f"{FILES}/Stat", user="guest", path="a").json()["entry"]
    assert (entry["path"], entry["owner"]) == ("/srv/héim/a", "guest")
    assert caller.call(f"{FILES}/Stat", path="~").json()["entry"]["path"] == "/root"
    assert caller.call(f"{FILES}/Stat", path="").json()["entry"]["path"] == "/root"
    assert caller.call(f"{FILES}/Stat", path="//").json()["entry"]["path"] == "/"
    assert caller.call(f"{FILES}/Stat", path="~guest/a").status_code == 400
    assert caller.call(f"{FILES}/Stat", user="ghost", path="/").status_code == 401
    said(server, box, "userdel -r guest 2>/dev/null; rm -rf /srv/héim")


def test_labels_stay_with_a_file_where_there_can_be_any(
    server: RealServer, box: str, caller: Caller
) -> None:
    caller.write(
        "/tmp/e2b/l/file", b"1", **{"X-Metadata-Kind": "one", "X-Metadata-Other": "x" * 500}
    )
    caller.write("/tmp/e2b/l/none", b"1")
    listed = caller.call(f"{FILES}/ListDir", path="/tmp/e2b/l").json()["entries"]
    assert listed[0]["metadata"] == {"kind": "one", "other": "x" * 500}
    assert "metadata" not in listed[1]
    moved = caller.call(f"{FILES}/Move", source="/tmp/e2b/l/file", destination="/tmp/e2b/m/n/file")
    assert moved.json()["entry"]["metadata"]["kind"] == "one"
    caller.write("/tmp/e2b/m/n/file", b"2", **{"X-Metadata-Third": "3"})
    entry = caller.call(f"{FILES}/Stat", path="/tmp/e2b/m/n/file").json()["entry"]
    assert entry["metadata"] == {"third": "3"}
    # Without labels a file can be written anywhere.
    caller.write("/dev/shm/file", b"1")
    caller.write("/run/file", b"1")
    said(server, box, "rm -rf /tmp/e2b/l /tmp/e2b/m /dev/shm/file /run/file")


def test_links_are_shown_with_what_they_lead_to(
    server: RealServer, box: str, caller: Caller
) -> None:
    said(server, box, "mkdir -p /tmp/e2b/k/d; cd /tmp/e2b/k; ln -s d one; ln -s one two; "
         "ln -s none b; ln -s loop loop; mkfifo p; chmod 4755 d; ln -s /dev/null n")  # fmt: skip
    listed = caller.call(f"{FILES}/ListDir", path="/tmp/e2b/k").json()["entries"]
    told = {one["name"]: (one["type"], one.get("symlinkTarget")) for one in listed}
    folder, none = "FILE_TYPE_DIRECTORY", "FILE_TYPE_UNSPECIFIED"
    assert told == {
        "b": (none, "/tmp/e2b/k/b"), "d": (folder, None), "loop": (none, "/tmp/e2b/k/loop"),
        "n": (none, "/dev/null"), "one": (folder, "/tmp/e2b/k/d"), "p": (none, None),
        "two": (folder, "/tmp/e2b/k/d"),
    }  # fmt: skip
    assert {one["name"]: one["permissions"] for one in listed}["d"] == "durwxr-xr-x"
    # A link that is asked for is followed, and shown as it was asked for.
    caller.write("/tmp/e2b/k/two/file", b"12345678")
    inside = caller.call(f"{FILES}/ListDir", path="/tmp/e2b/k/two").json()["entries"]
    assert [one["path"] for one in inside] == ["/tmp/e2b/k/two/file"]
    said(server, box, "rm -rf /tmp/e2b/k")


def test_a_watch_that_is_kept_has_everything_and_leaves_nothing(
    server: RealServer, box: str, caller: Caller
) -> None:
    said(server, box, "mkdir -p /tmp/e2b/w/deep")
    names = [
        caller.call(f"{FILES}/CreateWatcher", path="/tmp/e2b/w", recursive=True).json()["watcherId"]
        for _ in range(3)
    ]
    caller.write("/tmp/e2b/w/deep/a", b"1")
    said(server, box, "cd /tmp/e2b/w; for i in $(seq 300); do : > new-$i; done; mv deep/a b; rm b")
    for name in names[:2]:
        answer = caller.call(f"{FILES}/GetWatcherEvents", watcherId=name).json()
        events = [(one["name"], one["type"].rpartition("_")[2]) for one in answer["events"]]
        assert events[:3] == [
            ("deep/a", "CREATE"), ("deep/a", "CHMOD"), ("deep/a", "WRITE")
        ]  # fmt: skip
        assert events[-3:] == [("deep/a", "RENAME"), ("b", "CREATE"), ("b", "REMOVE")]
        assert len([one for one in events if one[0].startswith("new-")]) >= 300
        again = caller.call(f"{FILES}/GetWatcherEvents", watcherId=name).json()
        assert again == {"events": []}
    server.act(box, "pause")
    server.act(box, "resume")
    caller.write("/tmp/e2b/w/after", b"1")
    answer = caller.call(f"{FILES}/GetWatcherEvents", watcherId=names[0]).json()
    assert "after" in [one["name"] for one in answer["events"]]
    assert caller.call(f"{FILES}/RemoveWatcher", watcherId=names[0]).json() == {}
    assert caller.call(f"{FILES}/RemoveWatcher", watcherId=names[0]).status_code == 404
    said(server, box, "rm -rf /tmp/e2b/w")
    wait_until(
        lambda: caller.call(f"{FILES}/GetWatcherEvents", watcherId=names[1]).status_code == 404
    )
    for name in names[1:]:
        caller.call(f"{FILES}/RemoveWatcher", watcherId=name)
    watches = "cat /proc/*/fdinfo/* 2>/dev/null | grep -c '^inotify'"
    wait_until(lambda: said(server, box, watches) in ("0", ""))
    for path, status in (("/tmp/e2b/none", 404), ("/etc/passwd", 400)):
        refused = caller.call(f"{FILES}/CreateWatcher", path=path)
        assert refused.status_code == status, refused.text


def test_watches_are_limited_and_the_old_give_way(
    server: RealServer, box: str, caller: Caller
) -> None:
    said(server, box, "mkdir -p /tmp/e2b/many")
    answers = [caller.call(f"{FILES}/CreateWatcher", path="/tmp/e2b/many") for _ in range(65)]
    made = [one.json()["watcherId"] for one in answers if one.status_code == 200]
    assert len(made) == 64
    assert answers[-1].json()["code"] == "failed_precondition"
    assert caller.call(f"{FILES}/RemoveWatcher", watcherId=made.pop()).status_code == 200
    again = caller.call(f"{FILES}/CreateWatcher", path="/tmp/e2b/many")
    assert again.status_code == 200
    for name in (*made, again.json()["watcherId"]):
        assert caller.call(f"{FILES}/RemoveWatcher", watcherId=name).json() == {}
    said(server, box, "rm -rf /tmp/e2b/many")


def test_the_end_of_a_process_is_kept(server: RealServer, box: str, caller: Caller) -> None:
    events, end = caller.run("/bin/sh", "-c", "echo out; echo err >&2; kill -TERM $$")
    assert end == {}
    last = events[-1]["end"]
    assert (last["exitCode"], last["exited"], last["status"]) == (-1, False, "signal: terminated")
    pid = events[0]["start"]["pid"]
    again, _ = caller.stream(f"{PROCESS}/Connect", {"process": {"pid": pid}})
    assert [list(one) for one in again] == [["start"], ["end"]]
    assert again[-1]["end"] == last
    events, _ = caller.run("pwd")
    assert base64.b64decode(events[1]["data"]["stdout"]) == b"/root\n"
    _, end = caller.run("/no/such/program")
    assert end["error"]["code"] == "invalid_argument"
