"""One machine saved again and again, in every order that its owner may think of; its clones."""

import time

import pytest
from tests.support.server import RealServer, is_slow, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.core]

# One process, for ever: to start others again and again is all that a slow guest would do.
_COUNT = """python3 -c '
import time
count = 0
while True:
    count += 1
    with open("/dev/shm/count", "w") as file:
        file.write(str(count))
    time.sleep(0.2)
' >/dev/null 2>&1 &"""
_COUNTS = "for n in $(seq 1 20); do test -s /dev/shm/count && exit; sleep 0.5; done; exit 1"
# The same pages and new ones, in memory and on the disk.
_WRITE = """set -e
head -c 100000 /dev/urandom | \\
    tee /dev/shm/always /dev/shm/only-{mark} /workspace/always > /workspace/only-{mark}
echo {mark} > /dev/shm/mark
sha256sum /dev/shm/always /workspace/always /dev/shm/only-* /workspace/only-* > /dev/shm/sums"""
_CHECK = """set -e
sha256sum -c /dev/shm/sums >/dev/null
now() { read -r n < /dev/shm/count || test -n "$n" || n=0; }
now; first=$n
until now; test "$n" -gt "$first"; do :; done
cat /dev/shm/mark"""

_IDENTITY = """hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id
head -c 32 /dev/urandom | base64 -w0; echo; date +%s.%N; df -BM --output=size / | tail -1"""


class Box:
    """A sandbox that knows what it was told to remember."""

    def __init__(self, server: RealServer, reference: object) -> None:
        self.server = server
        self.id = str(reference)

    def count(self) -> None:
        """Have a process count in it; again, where a guest lets a program die as it starts."""
        for _ in range(3 if is_slow() else 1):
            self.server.execute(self.id, _COUNT)
            if self.server.execute(self.id, _COUNTS)["exitCode"] == 0:
                return
        raise AssertionError("nothing counts")

    def write(self, mark: str) -> None:
        said = self.server.execute(self.id, _WRITE.format(mark=mark))
        assert said["exitCode"] == 0, said

    def check(self, mark: str) -> None:
        """It remembers just that, byte by byte, and what ran in it goes on."""
        said = self.server.execute(self.id, _CHECK)
        assert (said["exitCode"], said["stdout"]) == (0, f"{mark}\n"), said

    def snapshot(self, name: str) -> None:
        self.server.act(self.id, "snapshots", name=name)

    def of(self, snapshot: str) -> "Box":
        return Box(self.server, self.server.create(snapshot=snapshot)["id"])


def test_snapshots_and_pauses_in_any_order_keep_every_moment(server: RealServer) -> None:
    one = Box(server, server.create()["id"])
    one.count()
    one.write("a")
    one.snapshot("a")
    one.write("b")
    one.snapshot("b")
    one.write("c")
    server.act(one.id, "pause")
    server.act(one.id, "resume")
    one.check("c")
    one.write("d")
    one.snapshot("d")
    for mark in ("a", "b", "d"):
        other = one.of(mark)
        other.check(mark)
        server.delete(other.id)
    # A fork of a fork, each saved more than once.
    fork = one.of("b")
    fork.write("fork")
    fork.snapshot("fork")
    fork.write("fork-later")
    fork.snapshot("fork-later")
    for mark in ("fork", "fork-later"):
        second = fork.of(mark)
        second.check(mark)
        server.act(second.id, "pause")
        second.check(mark)
        server.delete(second.id)
    fork.check("fork-later")
    one.check("d")


def test_what_a_killed_server_left_running_is_saved_whole(server: RealServer) -> None:
    one = Box(server, server.create()["id"])
    one.count()
    one.write("before")
    one.snapshot("before")
    one.write("meanwhile")
    pid = server.pid_of(one.id)
    server.kill()
    server.start()
    wait_until(lambda: server.status(one.id) == "running", what="it is adopted")
    assert server.pid_of(one.id) == pid
    one.check("meanwhile")
    one.snapshot("after")
    one.write("later")
    server.act(one.id, "pause")
    one.check("later")
    for mark, name in (("before", "before"), ("meanwhile", "after")):
        other = one.of(name)
        other.check(mark)
        server.delete(other.id)


def test_clones_are_themselves_whatever_their_disk(server: RealServer) -> None:
    """Each has a name, an id, randomness, a clock that is right, and the disk that was asked for.

    What is asked in one command, for that is what takes time where guests are slow.
    """
    seen = []
    for size in ("5GB", "9GB"):
        box = server.create(resources={"disk": size})["id"]
        before = time.time()
        said = str(server.execute(box, _IDENTITY)["stdout"]).split()
        name, machine, boot, chance, clock, mebibytes = said
        assert name == box
        # The command itself takes a while; within that, the clock is right to 100 ms.
        assert before - 0.1 <= float(clock) <= time.time() + 0.1
        least = int(size.removesuffix("GB")) * 900
        assert least <= int(mebibytes.rstrip("M")) <= least * 1.2
        seen.append((machine, boot, chance, server.record_of(box)["token"]))
    for values in zip(*seen, strict=True):
        assert len(set(values)) == len(seen)
