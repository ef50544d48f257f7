"""What a sandbox may reach, proven with listeners of the test's own.

Each address that must be out of reach is first shown to be reachable from the host, and then from
the sandbox with the rules taken away: silence alone would prove nothing.
"""

import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.support.server import RealServer, wait_until

from sandyard.server.core.wire import AGENT_PORT

pytestmark = pytest.mark.machine

NETNS = "test-world"
PUBLIC, PRIVATE, METADATA = "203.0.113.77", "192.168.213.77", "169.254.169.254"
AZURE = "168.63.129.16"  # looks public, and is the host endpoint of every Azure machine
HOST_SIDE, NEIGHBOUR = "198.51.100.1", "198.51.100.77"
PORT = 8099
ANSWER = "listening"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A namespace that plays the world: a public, a private and the metadata address."""
    subprocess.run(["ip", "netns", "del", NETNS], capture_output=True, check=False)
    ip("netns", "add", NETNS)
    listeners: list[subprocess.Popen[bytes]] = []
    try:
        ip("link", "add", "wtest0", "type", "veth", "peer", "name", "w0", "netns", NETNS)
        ip("addr", "add", f"{HOST_SIDE}/24", "dev", "wtest0")
        ip("link", "set", "wtest0", "up")
        for address in (NEIGHBOUR, PUBLIC, PRIVATE, METADATA, AZURE):
            ip("-n", NETNS, "addr", "add", f"{address}/24", "dev", "w0")
        ip("-n", NETNS, "link", "set", "w0", "up")
        ip("-n", NETNS, "link", "set", "lo", "up")
        ip("-n", NETNS, "route", "add", "default", "via", HOST_SIDE)
        for address in (PUBLIC, PRIVATE, METADATA, AZURE):
            ip("route", "add", f"{address}/32", "via", NEIGHBOUR)
        script = textwrap.dedent(f"""
            import socket
            with socket.create_server(("0.0.0.0", {PORT})) as listener:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(b"{ANSWER}")
        """)
        listeners += [
            subprocess.Popen([*command, "python3", "-c", script], start_new_session=True)
            for command in (["ip", "netns", "exec", NETNS], [])
        ]
        for address in (PUBLIC, PRIVATE, METADATA, AZURE, HOST_SIDE, NEIGHBOUR):
            wait_until(lambda address=address: from_host(address), what=f"{address} answers")  # type: ignore[misc]
        yield
    finally:
        for listener in listeners:
            listener.kill()
            listener.wait()
        subprocess.run(["ip", "link", "del", "wtest0"], check=False)
        ip("netns", "del", NETNS)


PROBE = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as there:
        print(there.recv(99).decode())
except OSError as error:
    print("refused", error)
"""


def from_host(address: str, port: int = PORT) -> bool:
    said = subprocess.run(
        ["python3", "-c", PROBE, address, str(port)], capture_output=True, text=True, check=True
    ).stdout
    return ANSWER in said


def reaches(server: RealServer, box: str, address: str, port: int = PORT) -> bool:
    end = server.execute(box, f"python3 - {address} {port}", stdin=PROBE, timeout=20_000)
    assert end["exitCode"] == 0, end
    return ANSWER in str(end["stdout"])


def slot_of(server: RealServer, box: str) -> str:

    record = server.record_of(box)
    return f"{server.prefix}-{record['slot']}"


def nft(netns: str | None, rules: str) -> None:
    command = ["ip", "netns", "exec", netns, "nft", "-f", "-"] if netns else ["nft", "-f", "-"]
    subprocess.run(command, input=rules, text=True, check=True, capture_output=True)


def saved(netns: str | None, table: str, *, family: str = "inet") -> str:
    command = ["ip", "netns", "exec", netns] if netns else []
    return subprocess.run(
        [*command, "nft", "list", "table", family, table], text=True, check=True,
        capture_output=True,
    ).stdout  # fmt: skip


def without_rules(server: RealServer, slots: list[str]) -> Iterator[None]:
    """Take every rule of filtering away, translation aside, and put it back afterwards."""
    table = f"sandyard_{server.instance['id']}"
    kept = [(slot, "sandyard", saved(slot, "sandyard")) for slot in slots]
    kept.append((None, table, saved(None, table)))  # type: ignore[arg-type]
    for netns, name, _ in kept:
        chains = ("input", "forward") if netns else ("input", "forward", "from_slots", "to_slots")
        for chain in chains:
            policy = f"chain inet {name} {chain} {{ policy accept; }}" if netns else ""
            nft(netns, f"flush chain inet {name} {chain}\n{policy}\n")
    try:
        yield
    finally:
        for netns, name, rules in kept:
            nft(netns, f"delete table inet {name}\n{rules}")


@pytest.mark.parametrize("address", [PRIVATE, METADATA, AZURE, HOST_SIDE, NEIGHBOUR])
def test_private_metadata_and_host_are_out_of_reach_by_rule_alone(
    server: RealServer, box: str, world: None, address: str
) -> None:
    assert from_host(address)
    # The host has just joined this network; the rules follow, and are not saved before they have.
    table = f"sandyard_{server.instance['id']}"
    network = NEIGHBOUR.rpartition(".")[0]
    wait_until(lambda: network in saved(None, table), what="the rules follow")
    wait_until(lambda: not reaches(server, box, address), what=f"{address} is out of reach")
    lifted = without_rules(server, [slot_of(server, box)])
    next(lifted)
    try:
        assert reaches(server, box, address), "the test would pass without any rule"
    finally:
        next(lifted, None)
    assert not reaches(server, box, address)


def test_the_hosts_own_end_of_the_slot_is_out_of_reach(
    server: RealServer, box: str, world: None
) -> None:
    ip_address = str(server.get(box)["ip"])
    gateway = ip_address.rpartition(".")[0] + "." + str(int(ip_address.rpartition(".")[2]) - 1)
    assert from_host(gateway)
    assert not reaches(server, box, gateway)


def test_the_internet_is_reached(server: RealServer, box: str, world: None) -> None:
    assert reaches(server, box, PUBLIC)


def test_sandboxes_do_not_reach_each_other(server: RealServer, box: str, world: None) -> None:
    other = str(server.create()["id"])
    listen = (
        f"python3 -c \"import socket; s = socket.create_server(('0.0.0.0', {PORT}))\n"
        f"while True: c, _ = s.accept(); c.sendall(b'{ANSWER}'); c.close()\" >/dev/null 2>&1 &"
    )
    server.execute(other, listen)
    address = str(server.get(other)["ip"])
    # From the host the sandbox's address leads to it, as the API promises.
    wait_until(lambda: from_host(address), what="the other sandbox listens")
    assert not reaches(server, box, address)
    lifted = without_rules(server, [slot_of(server, box), slot_of(server, other)])
    next(lifted)
    try:
        assert reaches(server, box, address), "the test would pass without any rule"
    finally:
        next(lifted, None)
    assert not reaches(server, box, address)


def connects(address: str, port: int) -> bool:
    """Tell whether somebody takes a connection, whatever comes of it."""
    script = "import socket, sys; socket.create_connection((sys.argv[1], sys.argv[2]), timeout=3)"
    command = ["python3", "-c", script, address, str(port)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_no_address_leads_to_the_agent(server: RealServer, box: str, world: None) -> None:
    slot, address = slot_of(server, box), str(server.get(box)["ip"])
    assert not connects(address, AGENT_PORT)
    rules = saved(slot, "sandyard")
    found = re.search(rf'(iifname "\S+" ip daddr \S+) tcp dport != {AGENT_PORT} (dnat .*)', rules)
    assert found is not None
    where, what = found.groups()
    nft(slot, f"insert rule inet sandyard prerouting {where} tcp dport {AGENT_PORT} {what}")
    try:
        assert connects(address, AGENT_PORT), "the test would pass without any rule"
    finally:
        nft(slot, f"delete table inet sandyard\n{rules}")
    assert not connects(address, AGENT_PORT)


@contextmanager
def without_guard(slot: str) -> Iterator[None]:
    """Take away what stands at a slot's tap, and put it back afterwards; what came past it in the
    meantime is forgotten."""
    kept = saved(slot, "sandyard", family="netdev")
    tap = re.search(r'device "(\S+)"', kept)
    assert tap is not None
    within = ["ip", "netns", "exec", slot]
    # By itself the kernel may turn away whose answers would not go there (rp_filter).
    strict = [f"net.ipv4.conf.{one}.rp_filter" for one in ("all", tap.group(1))]
    was = [
        subprocess.run([*within, "sysctl", "-n", one], text=True, check=True,
                       capture_output=True).stdout.strip()
        for one in strict
    ]  # fmt: skip
    nft(slot, "delete table netdev sandyard")
    try:
        for one in strict:
            subprocess.run([*within, "sysctl", "-qw", f"{one}=0"], check=True)
        yield
    finally:
        nft(slot, kept)
        for one, value in zip(strict, was, strict=True):
            subprocess.run([*within, "sysctl", "-qw", f"{one}={value}"], check=True)
        ip("-n", slot, "neigh", "flush", "dev", tap.group(1))


@contextmanager
def heard(folder: Path) -> Iterator[Callable[[], str]]:
    """Give what is heard in the world by those who send it there, a datagram each."""
    script = textwrap.dedent(f"""
        import socket
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
            listener.bind(("{PUBLIC}", {PORT}))
            print("ready", flush=True)
            while True:
                print(listener.recv(99).decode(), flush=True)
    """)
    with (folder / "heard").open("w") as said:
        listener = subprocess.Popen(
            ["ip", "netns", "exec", NETNS, "python3", "-c", script], stdout=said
        )
        try:
            wait_until(lambda: "ready" in (folder / "heard").read_text(), what="it listens")
            yield (folder / "heard").read_text
        finally:
            listener.kill()
            listener.wait()


SENDER = f"""
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.bind((sys.argv[1], 0))
    sender.sendto(sys.argv[2].encode(), ("{PUBLIC}", {PORT}))
"""


def test_a_false_sender_gets_nowhere(
    server: RealServer, box: str, world: None, tmp_path: Path
) -> None:
    def send(what: str, sender: str = "0.0.0.0") -> None:
        end = server.execute(box, f"python3 - {sender} {what}", stdin=SENDER)
        assert end["exitCode"] == 0, end

    false, slot = "203.0.113.9", slot_of(server, box)
    assert server.execute(box, f"ip addr add {false}/32 dev eth0")["exitCode"] == 0
    try:
        with heard(tmp_path) as said:
            send("false", false)
            send("true")
            wait_until(lambda: "true" in said(), what="its own word is heard")
            assert "false" not in said()
            lifted = without_rules(server, [slot])
            next(lifted)
            try:
                with without_guard(slot):
                    send("lifted", false)
                    wait_until(lambda: "lifted" in said(), what="it is the rules that do it")
            finally:
                next(lifted, None)
            send("again", false)
            send("last")
            wait_until(lambda: "last" in said(), what="its own word is heard")
            assert "again" not in said()
    finally:
        server.execute(box, f"ip addr del {false}/32 dev eth0")
    assert reaches(server, box, PUBLIC)


FORGER = """
import os, socket, struct
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
mac, gateway = bytes.fromhex("027379000002"), bytes.fromhex("027379000001")
asks = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
for number in range(400):
    false = mac if number % 2 else os.urandom(5).join((b"\\x02", b""))
    sender = bytes((172, 16, 0, 2)) if not number % 2 else bytes((172, 16, number % 256, 9))
    body = asks + false + sender + bytes(6) + bytes((172, 16, 0, 1))
    raw.send(b"\\xff" * 6 + false + b"\\x08\\x06" + body)
for number in range(2000):
    there = bytes((203, 0, 113, number % 256))
    head = struct.pack("!BBHHHBBH4s4s", 69, 0, 20, number, 0, 64, 3 + number % 200 + 20, 0,
                       bytes((172, 16, 0, 2)), there)
    total = sum(struct.unpack("!10H", head))
    check = struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
    raw.send(gateway + mac + b"\\x08\\x00" + head[:10] + check + head[12:])
"""


def connections(netns: str) -> int:
    path = "/proc/sys/net/netfilter/nf_conntrack_count"
    return int(
        subprocess.run(
            ["ip", "netns", "exec", netns, "cat", path], capture_output=True, text=True, check=True
        ).stdout
    )


def neighbours(netns: str) -> int:
    """How many neighbours the kernel knows in a slot, and on the links that lead to slots."""
    shown = [
        subprocess.run(
            ["ip", *where, "neigh", "show", "nud", "all"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for where in (["-n", netns], [])
    ]
    return len(shown[0]) + sum(f" dev {netns.rpartition('-')[0]}" in one for one in shown[1])


def test_forged_frames_do_not_fill_the_hosts_tables(
    server: RealServer, box: str, world: None
) -> None:
    slot = slot_of(server, box)

    def left() -> tuple[int, int]:
        """Return how many neighbours and connections more are known for what is forged now."""
        before = neighbours(slot)
        earlier = connections(slot)  # of the tests before: it remembers those that have ended
        end = server.execute(box, "python3 -", stdin=FORGER, timeout=60_000)
        assert end["exitCode"] == 0, end
        return neighbours(slot) - before, connections(slot) - earlier

    known, open_ = left()
    assert (known < 50, open_ < 200) == (True, True), (known, open_)
    with without_guard(slot):
        known, open_ = left()
    assert (known > 100, open_ > 1000) == (True, True), (known, open_)
    assert reaches(server, box, PUBLIC)


FLOWS = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flow:
    for number in range(6000):
        flow.sendto(b"x", ("{PUBLIC}", 1024 + number))
"""


def test_a_slot_has_so_many_connections_and_no_more(server: RealServer, world: None) -> None:
    crowded = str(server.create()["id"])
    slot = slot_of(server, crowded)
    end = server.execute(crowded, "python3 -", stdin=FLOWS, timeout=60_000)
    assert end["exitCode"] == 0, end
    assert 3000 < connections(slot) < 4400


def test_ipv6_is_off(server: RealServer, box: str) -> None:
    slot = slot_of(server, box)
    shown = subprocess.run(
        ["ip", "-n", slot, "-6", "addr"], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == ""


def test_names_are_resolved_by_the_nodes_forwarder(server: RealServer, box: str) -> None:
    """A resolver of the test's own answers over UDP, and over TCP where it says so."""
    resolver = Path(__file__).parents[1] / "support/resolver.py"
    original = Path("/etc/resolv.conf").read_text()
    running = subprocess.Popen(["python3", str(resolver)], start_new_session=True)
    try:
        Path("/etc/resolv.conf").write_text("nameserver 127.0.0.53\n")
        lookup = "python3 -c \"import socket; print(socket.gethostbyname('{}'))\""
        wait_until(
            lambda: server.execute(box, lookup.format("small.test"))["stdout"] == "203.0.113.5\n",
            what="a name is resolved",
        )
        assert server.execute(box, lookup.format("large.test"))["stdout"] == "203.0.113.6\n"
    finally:
        Path("/etc/resolv.conf").write_text(original)
        running.kill()
        running.wait()


SILENT = """
import socket
with socket.create_server(("0.0.0.0", 8100)) as listener:
    kept = []
    while True:
        kept.append(listener.accept())
"""
READER = """
import socket
with socket.create_connection(("203.0.113.77", 8100), timeout=5) as there:
    there.settimeout(None)
    print("open", flush=True)
    try:
        print("read", len(there.recv(1)), flush=True)
    except OSError as error:
        print("error", error.errno, flush=True)
"""


@pytest.mark.kernel_option("INET_DIAG_DESTROY")
def test_connections_that_were_open_see_a_reset_after_a_resume(
    server: RealServer, box: str, world: None
) -> None:
    """An idle reader too, which would otherwise wait for ever."""
    listener = subprocess.Popen(
        ["ip", "netns", "exec", NETNS, "python3", "-c", SILENT], start_new_session=True
    )
    try:
        wait_until(lambda: reaches(server, box, PUBLIC), what="the world is there")
        server.execute(box, "cat > /reader.py", stdin=READER)
        server.execute(box, "python3 -u /reader.py > /said 2>&1 &")
        wait_until(
            lambda: "open" in str(server.execute(box, "cat /said")["stdout"]), what="it reads"
        )
        server.act(box, "pause")
        server.act(box, "resume")
        wait_until(
            lambda: "error" in str(server.execute(box, "cat /said")["stdout"]),
            limit_s=10, what="the idle reader is told",
        )  # fmt: skip
    finally:
        listener.kill()
        listener.wait()


def egress_process(server: RealServer, box: str) -> list[int]:
    """Return the processes that enforce a sandbox's rules. One that has ended may wait for its
    parent to read its exit status, longer on a busy host, and does not count."""
    uid = server.egress_uids()[int(server.record_of(box)["slot"])]
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            status = path.read_text()
            if re.search(rf"^State:\s+[^ZX].*^Uid:\s+{uid}\s", status, re.DOTALL | re.MULTILINE):
                found.append(int(path.parent.name))
    return found


def test_network_rules_hold_over_pauses_forks_and_the_servers_end(
    server: RealServer, world: None
) -> None:
    rules = {"egress": "deny", "allow": [PUBLIC]}
    box = str(server.create(network=rules)["id"])
    other = "203.0.113.78"
    ip("-n", NETNS, "addr", "add", f"{other}/24", "dev", "w0")
    ip("route", "add", f"{other}/32", "via", NEIGHBOUR)
    wait_until(lambda: from_host(other), what="the other address answers")

    def holds(box: str) -> bool:
        return reaches(server, box, PUBLIC) and not reaches(server, box, other)

    assert holds(box)
    named = server.execute(box, "getent ahostsv4 example.com || echo unknown", timeout=20_000)
    assert "unknown" in str(named["stdout"])
    server.act(box, "pause")
    server.wait_running(server.act(box, "resume")["id"])
    assert holds(box)
    (fork,) = server.act(box, "fork", count=1)
    server.wait_running(fork["id"])
    assert holds(str(fork["id"]))
    server.delete(fork["id"])
    # The server dies, and its process of the rules lives; then that dies, too, and another comes.
    [pid] = egress_process(server, box)
    server.kill()
    os.kill(pid, 0)
    server.start()
    assert holds(box)
    assert egress_process(server, box) == [pid]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: holds(box), what="the rules hold again")
    answer = server.client.put(f"/v1/sandboxes/{box}/network", json={"deny": [PUBLIC]})
    assert answer.status_code == 200, answer.text
    assert reaches(server, box, other)
    assert not reaches(server, box, PUBLIC)
    lines = server.client.get(f"/v1/sandboxes/{box}/egress").json()["data"]
    assert {(one["verdict"], one["address"]) for one in lines} >= {
        ("allowed", PUBLIC), ("refused", other), ("allowed", other), ("refused", PUBLIC),
    }  # fmt: skip
    # Without rules there is nothing in between.
    assert server.client.put(f"/v1/sandboxes/{box}/network", json={}).status_code == 200
    assert egress_process(server, box) == []
    assert reaches(server, box, PUBLIC)
    server.delete(box)
    ip("route", "del", f"{other}/32")
