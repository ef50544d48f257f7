"""Network rules, by a guest's own traffic: a slot, its egress process, and a world outside.

There is no machine: a network namespace sits at the slot's tap, which is all that a guest is to
the rules. What must not be reached is first shown to be reachable without them.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.egress import Lab, lab, policy, world
from tests.support.world import BAD, GOOD, OTHER, PRIVATE

from sandyard.server.core.egress import NO_RULES
from sandyard.server.egress import config
from sandyard.server.egress.journal import LINES_MAX, Line

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

# Dials an address, sends what it reads, a line in hex after the other, and prints all that comes.
TALK = """
import socket, sys, time
host, port = sys.argv[1], int(sys.argv[2])
try:
    with socket.create_connection((host, port), timeout=20) as there:
        there.settimeout(20)
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in sys.stdin:
            there.sendall(bytes.fromhex(piece))
            time.sleep(0.01)
        while data := there.recv(65536):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
except OSError as error:
    print("refused:", error)
"""
# Sends an ICMP echo request, and prints the type of what comes back.
PING = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
    icmp.settimeout(5)
    icmp.sendto(b"\\x08\\0\\xf7\\xff\\0\\0\\0\\0", (sys.argv[1], 0))
    print(icmp.recv(999)[20])
"""
# Asks a resolver for a name and type, by UDP or TCP, and prints the code and the answers.
ASK = """
import dns.message, dns.query, dns.rcode, sys
server, how, name, kind = sys.argv[1:]
try:
    query = dns.message.make_query(name, kind)
    answer = getattr(dns.query, how)(query, server, timeout=3 if server != "172.16.0.1" else 20)
    found = sorted(str(one) for each in answer.answer for one in each)
    print(dns.rcode.to_text(answer.rcode()), *found)
except Exception as error:
    print("failed:", type(error).__name__)
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("outside")
    with world(folder):
        yield folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, outside: Path) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab"), outside) as made:
        yield made


@pytest.fixture
def guest(shared: Lab) -> Lab:
    shared.begin()
    return shared


async def only_process(guest: Lab) -> int:
    [pid] = await guest.pids()
    return pid


async def talk(guest: Lab, host: str, port: int, *pieces: bytes) -> str:
    lines = "".join(f"{one.hex()}\n" for one in pieces)
    return await guest.run(sys.executable, "-c", TALK, host, str(port), stdin=lines)


async def ask(
    guest: Lab, name: str, kind: str = "A", *, how: str = "udp", of: str = "172.16.0.1"
) -> str:
    return (await guest.python(ASK, of, how, name, kind)).strip()


async def test_without_rules_there_is_no_process_and_everything_is_reached(guest: Lab) -> None:
    guest.restrict(NO_RULES)
    assert GOOD in await guest.curl("http://good.test/")
    assert BAD in await guest.curl("-k", "https://bad.test/")
    assert "hello" in await talk(guest, BAD, 22, b"x", b"")
    assert not list(guest.folder.glob("*.sock"))
    assert await guest.pids() == []
    assert guest.journal() == []


async def test_names_open_the_ports_of_the_web(guest: Lab) -> None:
    guest.restrict(policy("good.test", "*.good.test"))
    for name in ("good.test", "GOOD.test", "deep.good.test"):
        assert GOOD in await guest.curl(f"http://{name}/")
        assert GOOD in await guest.curl("-k", f"https://{name}/")
    assert "resolve" in await guest.curl("http://bad.test/")
    # However the guest comes to an address: what it asks for there is what is judged.
    for how in ("http://bad.test/", "https://bad.test/"):
        for address in (GOOD, BAD):
            port = 443 if "https" in how else 80
            said = await guest.curl("-k", "--resolve", f"bad.test:{port}:{address}", how)
            assert "do not allow bad.test" in said or "access denied" in said, said
    assert "refused" in await talk(guest, GOOD, 22, b"x")
    assert "refused" in await talk(guest, GOOD, 9999, b"x")


async def test_the_name_is_dialed_and_not_the_address_that_the_guest_chose(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    for how, port in (("http", 80), ("https", 443)):
        said = await guest.curl("-k", "--resolve", f"good.test:{port}:{BAD}", f"{how}://good.test/")
        assert f'"at": "{GOOD}"' in said
    line = guest.journal()[-1]
    assert (line["address"], line["name"], line["rule"]) == (GOOD, "good.test", "good.test")


async def test_literal_addresses_meet_ranges_alone(guest: Lab) -> None:
    guest.restrict(policy("good.test", f"{OTHER}/32"))
    assert OTHER in await guest.curl(f"http://{OTHER}/")
    assert OTHER in await guest.curl("-k", f"https://{OTHER}/")
    assert "hello x" in await talk(guest, OTHER, 9999, b"x")
    assert f"do not allow {GOOD}" in await guest.curl(f"http://{GOOD}/")
    assert "access denied" in await guest.curl("-k", f"https://{GOOD}/")


async def test_what_is_denied_is_refused_and_the_rest_passes(guest: Lab) -> None:
    guest.restrict(policy("good.test", deny=("203.0.113.200/31",), egress="allow"))
    assert OTHER in await guest.curl("http://other.test/")
    assert "hello" in await talk(guest, OTHER, 22, b"x")
    assert "do not allow bad.test" in await guest.curl("http://bad.test/")
    assert "access denied" in await guest.curl("-k", "https://bad.test/")
    assert "refused" in await talk(guest, BAD, 22, b"x")
    assert GOOD in await guest.curl("http://good.test/"), "allow comes before deny"


async def test_a_name_with_a_port_opens_it_to_the_addresses_it_was_resolved_to(guest: Lab) -> None:
    guest.restrict(policy("good.test:22"))
    assert "refused" in await talk(guest, GOOD, 22, b"x"), "nobody has asked for its address"
    assert await ask(guest, "good.test") == f"NOERROR {GOOD}"
    assert "hello x" in await talk(guest, GOOD, 22, b"x")
    assert "refused" in await talk(guest, GOOD, 9999, b"x")
    assert "refused" in await talk(guest, BAD, 22, b"x")
    # Addresses are opened for a while, 64 at most, and never private ones.
    many = [f"203.0.113.{number}" for number in range(100, 190)]
    guest.resolves(many_test={"A": [*many, PRIVATE, BAD], "TTL": 0})
    guest.restrict(policy("many.test:22"))
    assert (await ask(guest, "many.test", how="tcp")).startswith("NOERROR")
    assert "refused" in await talk(guest, GOOD, 22, b"x")
    assert "refused" in await talk(guest, PRIVATE, 22, b"x")


async def test_names_are_answered_as_far_as_they_are_allowed(guest: Lab) -> None:
    guest.resolves(
        good_test={"A": [GOOD], "TXT": ['"v"'], "HTTPS": ["1 . alpn=h2"]},
        alias_test={"CNAME": "good.test", "FORGED": "bad.test"},
    )
    guest.restrict(policy("good.test", "alias.test", "large.test", "*.sub.test"))
    for how in ("udp", "tcp"):
        assert await ask(guest, "good.test", how=how) == f"NOERROR {GOOD}"
        assert await ask(guest, "good.test", "TXT", how=how) == 'NOERROR "v"'
        assert await ask(guest, "bad.test", how=how) == "REFUSED"
        assert await ask(guest, "deep.good.test", how=how) == "REFUSED"
        assert await ask(guest, "sub.test", how=how) == "REFUSED"
        assert await ask(guest, "nowhere.sub.test", how=how) == "NXDOMAIN"
        for kind in ("HTTPS", "SVCB"):  # they would carry keys that hide names
            assert await ask(guest, "good.test", kind, how=how) == "NOERROR"
        assert await ask(guest, "good.test", "ANY", how=how) == "REFUSED"
        assert await ask(guest, "evil\\.x.sub.test", how=how) == "REFUSED"
        # What was not asked for is not passed on.
        assert await ask(guest, "alias.test", how=how) == f"NOERROR {GOOD} good.test."
    assert await ask(guest, "large.test") == f"NOERROR {GOOD}", "by TCP, where UDP has no room"
    # Other resolvers are other hosts.
    for how in ("udp", "tcp"):
        assert (await ask(guest, "good.test", how=how, of=BAD)).startswith("failed")
    refused = {one["name"] for one in guest.journal() if one["port"] == 53}
    assert {"bad.test", "deep.good.test", "sub.test"} <= refused


async def test_private_addresses_are_reached_by_no_name(guest: Lab) -> None:
    guest.restrict(policy("private.test", "mixed.test", "0.0.0.0/0", "private.test:22"))
    assert await ask(guest, "private.test") == f"NOERROR {PRIVATE}"
    for how, port in (("http", 80), ("https", 443)):
        url = f"{how}://private.test/"
        assert '"at"' not in await guest.curl("-k", url)
        said = await guest.curl("-k", "--resolve", f"private.test:{port}:{GOOD}", url)
        assert f'"at": "{PRIVATE}"' not in said
    assert "refused" in await talk(guest, PRIVATE, 22, b"x")
    assert f'"at": "{GOOD}"' in await guest.curl(
        "--resolve", f"mixed.test:80:{GOOD}", "http://mixed.test/"
    )


async def test_what_is_not_tcp_meets_ranges_in_the_kernel(guest: Lab) -> None:
    script = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.settimeout(3)
    udp.connect((sys.argv[1], 9))
    try:
        udp.send(b"x")
        udp.recv(9)
    except OSError as error:
        print(type(error).__name__)
"""
    guest.restrict(policy("good.test", f"{OTHER}/32"))
    denied = ["PermissionError", "ConnectionRefusedError", "OSError"]  # ICMP: prohibited
    assert (await guest.python(script, GOOD)).strip() in denied, "at once, so that QUIC falls back"
    # There, nothing listens: its own kernel says so.
    assert (await guest.python(script, OTHER)).strip() == "ConnectionRefusedError"
    assert (await guest.python(PING, OTHER)).strip() == "0"
    assert (await guest.python(PING, GOOD)).strip() == "3", "unreachable"


def hello(name: str) -> bytes:
    import ssl

    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def test_quic_passes_by_no_rule(guest: Lab) -> None:
    assert await guest.quic("good.test", GOOD, limit_s=30) == GOOD, "it is reached without rules"
    for name in ("good.test", "good.test:443"):
        guest.restrict(policy(name))
        assert await ask(guest, "good.test") == f"NOERROR {GOOD}"
        assert await guest.quic("good.test", GOOD, limit_s=3) == "unanswered"
    guest.restrict(policy(deny=(BAD,), egress="allow"))
    assert await guest.quic("good.test", GOOD, limit_s=30) == GOOD
    assert await guest.quic("bad.test", BAD, limit_s=3) == "unanswered"


async def test_a_first_message_of_tls_that_could_mean_something_else_is_refused(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    alert = "\x15\x03\x01"
    good, bad = hello("good.test"), hello("bad.test")
    whole = await talk(guest, BAD, 443, good)
    assert whole.startswith("\x16\x03"), "a server's answer"
    by_bytes = await talk(guest, BAD, 443, *(bytes([one]) for one in good[:90]), good[90:])
    assert by_bytes.startswith("\x16\x03")
    again = bad.replace(b"bad.test", b"good.test")  # lengths that do not fit any more
    for said in (bad, again, good[:5] + b"\2" + good[6:], b"\x16\3\1\xff\xff", b"x" * 70_000,
                 b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n"):  # fmt: skip
        answer = await talk(guest, GOOD, 443, said)
        assert answer.startswith(alert) or "refused" in answer, said[:20]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: good.test\r\nHost: bad.test\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\n\r\n", "400"), (b"GET / HTTP/1.0\r\n\r\n", "400"),
        (b"GET http://bad.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", "400"),
        (b"GET //bad.test/ HTTP/1.1\r\nHost: good.test:81\r\n\r\n", "403"),
        (b"CONNECT bad.test:443 HTTP/1.1\r\nHost: good.test\r\n\r\n", "405"),
        (b"TRACE / HTTP/1.1\r\nHost: good.test\r\n\r\n", "405"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "405"),
        (b"POST / HTTP/1.1\r\nHost: good.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked"
         b"\r\n\r\n0\r\n\r\nGET /", "400"),
        (b"POST / HTTP/1.1\r\nHost: good.test\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n"
         b"abcde", "400"),
        (b"GET / HTTP/1.1\r\nHost: good.test\r\nX: " + b"x" * 80_000 + b"\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nHost: good.test\r\nX y: z\r\n\r\n", "400"),
        (b"\0\1\2\3\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nHost: bad.test\r\nX-Host: good.test\r\n\r\n", "403"),
        (b"GET / HTTP/1.1\r\nHost: good.test@bad.test\r\n\r\n", "403"),
        (b"GET / HTTP/1.1\r\nHost: evil\\.good.test\r\n\r\n", "403"),
        (b"GET / HTTP/1.1\r\nHost: bad.test .good.test\r\n\r\n", "403"),
    ],
)  # fmt: skip
async def test_a_request_that_could_mean_something_else_is_refused(
    guest: Lab, request_: bytes, says: str
) -> None:
    guest.restrict(policy("good.test", "*.good.test"))
    said = await talk(guest, GOOD, 80, request_)
    assert said.startswith(f"HTTP/1.1 {says} "), said
    assert '"at"' not in said


async def test_each_request_of_a_connection_is_judged(guest: Lab) -> None:
    guest.restrict(policy("good.test", "other.test"))
    request = "GET /{} HTTP/1.1\r\nHost: {}\r\n\r\n"
    said = await talk(
        guest, GOOD, 80,
        (request.format(1, "good.test") + request.format(2, "other.test")).encode(),
        (request.format(3, "bad.test") + request.format(4, "good.test")).encode(),
    )  # fmt: skip
    assert said.count("HTTP/1.1 200") == 2
    assert f'"at": "{GOOD}", "method": "GET", "target": "/1"' in said
    assert f'"at": "{OTHER}", "method": "GET", "target": "/2"' in said
    assert "do not allow bad.test" in said
    assert "/4" not in said
    # What a chunked body hides is a body.
    hidden = request.format("hidden", "bad.test").encode()
    chunk = f"{len(hidden):x}".encode() + b"\r\n" + hidden + b"\r\n0\r\n\r\n"
    said = await talk(
        guest, GOOD, 80,
        b"POST / HTTP/1.1\nHost: good.test\nTransfer-Encoding: chunked\n\n" + chunk,
        b"GET /end HTTP/1.1\r\nHost: good.test\r\nConnection: close\r\n\r\n",
    )  # fmt: skip
    assert f'"body": {len(hidden)}' in said
    assert "/end" in said


async def test_http_passes_as_it_is(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    put = ("curl", "-sS", "-X", "PUT", "--data-binary", "@-", "-H", "X-Case: Kept")
    said = await guest.run(*put, "http://good.test/a?b=c", stdin="x" * 200_000)
    assert '"body": 200000' in said
    assert "X-Case: Kept" in said
    assert "Expect" not in await guest.curl("-H", "Expect:", "http://good.test/")
    assert len(await guest.curl("http://good.test/large")) == 1024 * 1024
    assert GOOD in await guest.curl("http://good.test/until-it-ends")
    assert GOOD in await guest.curl("http://good.test/old"), "a server of HTTP/1.0"
    assert "h2c" not in await guest.curl("--http2", "http://good.test/")
    assert await guest.curl("-I", "http://good.test/")
    chunked = await guest.curl("-H", "Transfer-Encoding: chunked", "-d", "abc", "http://good.test/")
    assert '"body": 3' in chunked
    upgraded = await talk(
        guest, GOOD, 80,
        b"GET / HTTP/1.1\r\nHost: good.test\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
        b"after",
    )  # fmt: skip
    assert "101" in upgraded
    assert "hello after" in upgraded


async def test_a_change_ends_what_no_longer_fits_and_nothing_else(guest: Lab) -> None:
    guest.restrict(policy("good.test", f"{OTHER}/32", "bad.test:22"))
    await ask(guest, "bad.test")
    script = """
import socket, sys, threading, time
def hold(host, port, words):
    with socket.create_connection((host, port), timeout=20) as there:
        there.sendall(words)
        there.recv(100)
        sys.stdout.write("up\\n")
        sys.stdout.flush()
        try:
            while there.recv(100): pass
        except OSError: pass
        sys.stdout.write(f"end {port}\\n")
        sys.stdout.flush()
web = b"GET /slow HTTP/1.1\\r\\nHost: good.test\\r\\n\\r\\n"
threads = [threading.Thread(target=hold, args=one, daemon=True) for one in
    [(sys.argv[1], 80, web)] * 20 + [(sys.argv[2], 22, b"x")] * 20
    + [(sys.argv[3], 9999, b"x")] * 20]
for one in threads: one.start()
sys.stdin.read()
"""
    holding = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", guest.name, "python3", "-c", script, GOOD, BAD, OTHER,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert holding.stdout is not None
    async with asyncio.timeout(60):
        for _ in range(60):
            assert await holding.stdout.readline() == b"up\n"
        guest.restrict(policy(f"{OTHER}/32", "bad.test:22"))
        assert {await holding.stdout.readline() for _ in range(20)} == {b"end 80\n"}
        guest.restrict(policy(f"{OTHER}/32"))
        assert {await holding.stdout.readline() for _ in range(20)} == {b"end 22\n"}
        guest.restrict(policy())
        assert {await holding.stdout.readline() for _ in range(20)} == {b"end 9999\n"}
        assert holding.stdin is not None
        holding.stdin.close()
        await holding.wait()


async def test_connections_of_the_time_before_the_rules_end(guest: Lab) -> None:
    guest.restrict(NO_RULES)
    script = f"""
import socket
with socket.create_connection(("{BAD}", 9999), timeout=20) as there:
    there.recv(100)
    print("up", flush=True)
    input()
    try:
        there.sendall(b"x")
        print(there.recv(100))
    except OSError as error:
        print(type(error).__name__)
"""
    holding = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", guest.name, "python3", "-c", script,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert holding.stdout is not None
    async with asyncio.timeout(30):
        assert await holding.stdout.readline() == b"up\n"
        guest.restrict(policy("good.test"))
        said, _ = await holding.communicate(b"\n")
    assert said.strip() == b"ConnectionResetError"
    # And back: the table and the process are gone.
    guest.restrict(NO_RULES)
    assert BAD in await guest.curl("http://bad.test/")
    assert await guest.pids() == []


async def test_a_process_that_is_killed_is_started_again(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    pid = await only_process(guest)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while True:
            said = await guest.curl("--max-time", "2", "http://good.test/")
            assert BAD not in said
            if GOOD in said:
                break
            await asyncio.sleep(0.05)
    assert await only_process(guest) != pid


async def test_while_it_cannot_be_started_everything_is_refused(guest: Lab) -> None:
    guest.restrict(policy("good.test", f"{OTHER}/32"))
    guest.keeper.ask("break")
    try:
        os.kill(await only_process(guest), signal.SIGKILL)
        with pytest.raises(RuntimeError, match="no more processes"):
            guest.restrict(policy("bad.test"))
        assert "refused" in await talk(guest, OTHER, 9999, b"x")
        assert '"at"' not in await guest.curl(f"http://{OTHER}/")
    finally:
        guest.keeper.ask("mend")
    async with asyncio.timeout(30):
        while BAD not in await guest.curl("--max-time", "2", "http://bad.test/"):
            await asyncio.sleep(0.05)


async def test_rules_outlive_the_server_and_another_one_changes_them(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    pid = await only_process(guest)
    guest.keeper.end(kill=True)
    assert GOOD in await guest.curl("http://good.test/")
    assert BAD not in await guest.curl(
        "-k", "--resolve", f"bad.test:443:{BAD}", "https://bad.test/"
    )
    guest.keep_anew()
    guest.restrict(policy("bad.test"))
    assert await guest.pids() == [pid]
    assert BAD in await guest.curl("http://bad.test/")
    assert "resolve" in await guest.curl("http://good.test/")
    # One that died without a server, and rules that are gone: the next server sees to both.
    guest.keeper.end(kill=True)
    os.kill(pid, signal.SIGKILL)
    assert '"at"' not in await guest.curl("--max-time", "2", f"http://{BAD}/")
    guest.keep_anew()
    guest.restrict(policy("bad.test"))
    assert BAD in await guest.curl("http://bad.test/")
    guest.keeper.end(kill=True)
    guest.keep_anew()
    guest.restrict(NO_RULES)
    assert await guest.pids() == []
    assert GOOD in await guest.curl("http://good.test/")


async def test_the_process_cannot_be_dialed_or_looked_into(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    assert "refused" in await talk(guest, "172.16.0.1", config.EGRESS_PORT, b"x")
    assert "refused" in await talk(guest, str(guest.keeper.about["ip"]), config.EGRESS_PORT, b"x")
    pid = await only_process(guest)
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert set(status["Uid"].split()) == {str(guest.uid)}
    assert status["Groups"].strip() == ""
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    nice = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16]
    assert (nice, Path(f"/proc/{pid}/oom_score_adj").read_text().strip()) == ("5", "300")
    assert list(Path(f"/proc/{pid}/root").iterdir()) == []
    assert len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) == 1, "its own root"
    assert Path(f"/proc/{pid}/mem").stat().st_uid == 0, "it cannot be traced or dumped"
    own = ("setpriv", "--reuid", str(guest.uid), "--clear-groups")
    seen = await guest.run(*own, "head", "-c1", f"/proc/{pid}/mem")
    assert "denied" in seen
    # What it dials leaves by the slot's uplink, and the host refuses private addresses there. By
    # bash, because the interpreter of the tests may be in a home that others cannot read.
    for address, outcomes in ((GOOD, {"reached"}), (PRIVATE, {"not", ""})):  # it drops, or refuses
        script = f"(exec 3<>/dev/tcp/{address}/80) 2>/dev/null && echo reached || echo not"
        dialed = subprocess.run(
            ["timeout", "5", "ip", "netns", "exec", guest.netns, *own, "bash", "-c", script],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert dialed.stdout.strip() in outcomes, dialed


async def test_clients_that_say_nothing_do_not_keep_others_out(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    script = f"""
import socket, sys
held = []
for number in range(300):
    for port in (80, 443):
        held.append(socket.create_connection(("{GOOD}", port), timeout=5))
print("up", flush=True)
sys.stdin.read()
"""
    holding = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", guest.name, "python3", "-c", script,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert holding.stdout is not None
    async with asyncio.timeout(60):
        assert await holding.stdout.readline() == b"up\n"
        assert GOOD in await guest.curl("http://good.test/")
        assert GOOD in await guest.curl("-k", "https://good.test/")
        assert holding.stdin is not None
        holding.stdin.close()
        await holding.wait()


async def test_a_resolver_that_is_silent_delays_a_name_and_nothing_else(guest: Lab) -> None:
    guest.restrict(policy("*.good.test", f"{OTHER}/32"))
    guest.resolves(SILENT={"A": []})
    unknown = ("--resolve", f"new.good.test:80:{GOOD}", "http://new.good.test/")
    assert "cannot be resolved" in await guest.curl(*unknown)
    assert OTHER in await guest.curl(f"http://{OTHER}/")
    guest.resolves()
    assert GOOD in await guest.curl(*unknown)


async def test_the_journal_has_who_was_reached_and_what_passed(guest: Lab) -> None:
    guest.restrict(policy("good.test", f"{OTHER}/32"))
    await guest.curl("http://good.test/large")
    await guest.curl("-k", "https://good.test/")
    await talk(guest, OTHER, 9999, b"x" * 100)

    # The tests before may have been faster than a journal counts.
    def written() -> list[Line]:
        return [one for one in guest.journal() if one["verdict"] != "skipped"]

    async with asyncio.timeout(30):
        while len(written()) < 3:  # the last connection's, once both its ends have ended
            await asyncio.sleep(0.02)
    await guest.curl(f"http://{BAD}/")
    async with asyncio.timeout(30):
        while len(lines := written()) < 4:
            await asyncio.sleep(0.02)
    assert len(lines) <= LINES_MAX
    shown = [
        (one["verdict"], one["rule"], one["name"], one["address"], one["port"]) for one in lines
    ]
    assert shown == [
        ("allowed", "good.test", "good.test", GOOD, 80),
        ("allowed", "good.test", "good.test", GOOD, 443),
        ("allowed", f"{OTHER}/32", "", OTHER, 9999),
        ("refused", "egress", BAD, BAD, 80),
    ]
    assert int(str(lines[0]["bytesIn"])) > 1024 * 1024
    assert (lines[2]["bytesOut"], lines[2]["bytesIn"]) == (100, 106)
    assert socket.gethostname() not in str(lines)


def test_fifty_sandboxes_get_rules_at_once(guest: Lab) -> None:
    guest.restrict(policy("good.test"))
    found = json.loads(guest.keeper.ask("many", count=50))
    assert len(found["mib"]) == 50, "a process each"
    others = [one for one in subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout.split() if one.startswith(guest.netns.rpartition("-")[0])]  # fmt: skip
    assert len(others) <= 5, "the others are given back"


async def test_the_operator_may_allow_a_private_range(
    tmp_path_factory: pytest.TempPathFactory, outside: Path
) -> None:
    with lab(
        tmp_path_factory.mktemp("lab"),
        outside,
        allow=("192.168.213.0/24",),
        name="syd-test-guest-2",
    ) as guest:
        guest.restrict(policy("private.test"))
        assert PRIVATE in await guest.curl("http://private.test/")
        assert "do not allow" in await guest.curl(f"http://{PRIVATE}/")
        guest.restrict(policy(egress="allow", deny=("198.51.100.0/24",)))
        assert PRIVATE in await guest.curl(f"http://{PRIVATE}/")
