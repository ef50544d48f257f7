"""Headers with secrets that are added outside the machine, by a guest's own traffic.

The lab is that of `test_egress`. The hosts' servers answer with what arrived.
"""

import asyncio
import os
import signal
import ssl
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.support.egress import Lab, lab, policy, world
from tests.support.folders import files_with
from tests.support.world import BAD, GOOD, OTHER

from sandyard.server.core.egress import Credentials, Header, Injection, Policy
from sandyard.server.links.identities import new_network_authority

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

SECRET, NEXT = "s3cret-7f1c99aa", "s3cret-0b44e2d7"
CERTIFICATE, KEY, _ = new_network_authority("lab", datetime.now(UTC))
# Sends bytes over TLS as a client of `sys.argv[1]` would, and prints all that comes.
TALK_TLS = """
import socket, ssl, sys
address, name, authority, protocols = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
if protocols: context.set_alpn_protocols(protocols.split())
try:
    with socket.create_connection((address, 443), timeout=20) as plain, \\
         context.wrap_socket(plain, server_hostname=name) as there:
        print("protocol", there.selected_alpn_protocol())
        for piece in sys.stdin:
            there.sendall(bytes.fromhex(piece))
        while data := there.recv(65536):
            sys.stdout.write(data.decode("latin-1"))
except OSError as error:
    print("refused:", error)
"""


def injecting(*hosts: str, inspect: tuple[str, ...] = (), egress: str = "deny") -> Policy:
    """Return rules that allow the lab's hosts, and name these for injection."""
    made = policy("good.test", "other.test", "wrong.example", "expired.test", egress=egress)
    return replace(made, inject=tuple(map(Injection, hosts)), inspect=inspect, stamp="one")


def credentials(*headers: Header, stamp: str = "one") -> Credentials:
    return Credentials(stamp, headers, CERTIFICATE, KEY)


def bearer(host: str = "good.test", value: str | None = f"Bearer {SECRET}") -> Header:
    return Header(host, "Authorization", value, ("TOKEN",))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("outside")
    with world(folder):
        (folder / "authority.pem").write_text(CERTIFICATE)
        yield folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, outside: Path) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab"), outside) as made:
        yield made


@pytest.fixture
def guest(shared: Lab) -> Lab:
    shared.begin()
    return shared


async def fetch(guest: Lab, url: str, *more: str) -> str:
    """Fetch by a client that trusts the lab's authority alone."""
    return await guest.curl("--cacert", str(guest.outside / "authority.pem"), *more, url)


async def talk(guest: Lab, name: str, *pieces: bytes, address: str = GOOD, offers: str = "") -> str:
    lines = "".join(f"{one.hex()}\n" for one in pieces)
    authority = str(guest.outside / "authority.pem")
    command = (sys.executable, "-c", TALK_TLS, address, name, authority, offers)
    return await guest.run(*command, stdin=lines)


async def test_a_host_gets_the_secret_and_the_guest_never_does(guest: Lab) -> None:
    rules = injecting("good.test", "*.good.test")
    basic = Header("*.good.test", "X-Basic", "Basic Ym9iOnM=", ("TOKEN", "OTHER"))
    assert guest.restrict(rules, credentials(bearer(), basic)) == "one"
    own = ("-H", "authorization: Bearer of-the-guest", "-H", "X-Own: kept")
    said = await fetch(guest, "https://good.test/path?a=b", *own)
    assert f"Authorization: Bearer {SECRET}" in said
    assert "of-the-guest" not in said, "a guest's own value is dropped"
    assert "X-Own: kept" in said
    assert '"target": "/path?a=b"' in said
    # Whatever address the guest takes for the host's: the host itself is dialed.
    said = await fetch(guest, "https://good.test/", "--resolve", f"good.test:443:{BAD}")
    assert f'"at": "{GOOD}"' in said
    policy_of_all = injecting("*.good.test")
    policy_of_all = replace(policy_of_all, allow=("*.good.test",))
    guest.restrict(policy_of_all, credentials(basic))
    assert "X-Basic: Basic Ym9iOnM=" in await fetch(guest, "https://deep.good.test/")
    lines = guest.journal(3)
    assert [one.get("secrets") for one in lines] == [["TOKEN"], ["TOKEN"], ["OTHER", "TOKEN"]]
    assert SECRET not in str(lines)


async def test_no_other_host_gets_it(guest: Lab) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer()))
    # A redirect is the client's to follow, and what it finds there is another host.
    both = guest.outside / "both.pem"
    both.write_text(CERTIFICATE + (guest.outside / "certificate.pem").read_text())
    said = await guest.curl("-L", "--cacert", str(both), "https://good.test/away")
    assert f'"at": "{OTHER}"' in said
    assert "uthorization" not in said
    # Other hosts are not even looked into: their own certificates arrive.
    own = str(guest.outside / "certificate.pem")
    assert OTHER in await guest.curl("--cacert", own, "https://other.test/")
    assert "certificate" in await fetch(guest, "https://other.test/")
    # Nor is it sent by plain HTTP.
    assert "good.test is reached by https alone" in await guest.curl("http://good.test/")
    # A connection is for the host of its first message.
    for host in ("other.test", "bad.test", "good.test:444"):
        said = await talk(guest, "good.test", f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert "HTTP/1.1 421 " in said, said
        assert '"at"' not in said
        assert SECRET not in said


async def test_without_its_secret_a_request_is_refused(guest: Lab) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer(value=None)))
    said = await fetch(guest, "https://good.test/", "-i")
    assert "HTTP/1.1 502 " in said
    assert "TOKEN" in said
    assert '"at"' not in said
    assert [one["verdict"] for one in guest.journal()] == ["refused"]


async def test_a_new_value_is_used_in_the_next_request_of_an_open_connection(guest: Lab) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer()))
    script = """
import http.client, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
there = http.client.HTTPSConnection("good.test", context=context, timeout=30)
for _ in sys.stdin:
    there.request("GET", "/")
    port = there.sock.getsockname()[1]
    answer = there.getresponse()
    print(answer.status, answer.read().decode().strip(), port, flush=True)
"""
    client = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", guest.name, sys.executable, "-c", script,
        str(guest.outside / "authority.pem"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert client.stdin is not None
    assert client.stdout is not None
    said = []
    async with asyncio.timeout(60):
        for value in (f"Bearer {SECRET}", f"Bearer {NEXT}", None):
            rules = replace(injecting("good.test"), stamp=str(value))
            guest.restrict(rules, credentials(bearer(value=value), stamp=str(value)))
            client.stdin.write(b"\n")
            await client.stdin.drain()
            said.append((await client.stdout.readline()).decode())
        client.stdin.close()
        await client.wait()
    assert SECRET in said[0]
    assert NEXT in said[1]
    assert said[0].split()[-1] == said[1].split()[-1] == said[2].split()[-1], "one connection"
    assert said[2].startswith("502 ")


async def test_a_host_that_is_not_what_it_says_gets_nothing(guest: Lab) -> None:
    hosts = ("wrong.example", "expired.test", "good.test")
    guest.restrict(injecting(*hosts), credentials(*map(bearer, hosts)))
    said = await fetch(guest, "https://wrong.example/", "-i")
    assert "HTTP/1.1 502 " in said
    assert "mismatch" in said
    said = await fetch(guest, "https://expired.test/", "-i")
    assert "HTTP/1.1 502 " in said
    assert "expired" in said
    assert {one["verdict"] for one in guest.journal()} == {"refused"}
    assert SECRET in await fetch(guest, "https://good.test/")


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: good.test\r\nHost: other.test\r\n\r\n", "400"),
        (b"GET https://other.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", "400"),
        (b"CONNECT other.test:443 HTTP/1.1\r\nHost: good.test\r\n\r\n", "405"),
        (b"TRACE / HTTP/1.1\r\nHost: good.test\r\n\r\n", "405"),
        (b"trace / HTTP/1.1\r\nHost: good.test\r\n\r\n", "405"),
        (b"GET / HTTP/1.1\r\nHost: g\xadood.test\r\n\r\n", "400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "405"),
        (b"POST / HTTP/1.1\r\nHost: good.test\r\nContent-Length: 4\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /", "400"),
        (b"GET / HTTP/1.1\r\nHost: good.test\r\nX: " + b"x" * 80_000 + b"\r\n\r\n", "400"),
        (b"\0\1\2\3\r\n\r\n", "400"),
    ],
)  # fmt: skip
async def test_what_could_mean_something_else_is_refused_inside_tls_too(
    guest: Lab, request_: bytes, says: str
) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer()))
    said = await talk(guest, "good.test", request_, offers="h2 http/1.1")
    assert said.startswith(f"protocol http/1.1\nHTTP/1.1 {says} "), said
    assert '"at"' not in said


async def test_http_passes_inside_tls_as_it_is(guest: Lab) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer()))
    put = (
        "curl", "-sS", "--cacert", str(guest.outside / "authority.pem"), "-X", "PUT",
        "--data-binary", "@-",
    )  # fmt: skip
    assert '"body": 200000' in await guest.run(*put, "https://good.test/", stdin="x" * 200_000)
    assert len(await fetch(guest, "https://good.test/large")) == 1024 * 1024
    assert GOOD in await fetch(guest, "https://good.test/old")
    upgraded = await talk(
        guest, "good.test",
        b"GET / HTTP/1.1\r\nHost: good.test\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nafter",
    )  # fmt: skip
    assert "101" in upgraded
    assert "hello after" in upgraded
    many = await asyncio.gather(*(fetch(guest, f"https://good.test/{n}") for n in range(20)))
    assert all(f'"target": "/{n}"' in said and SECRET in said for n, said in enumerate(many))


async def test_a_guest_has_no_other_way_to_say_what_a_secret_says(guest: Lab) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer()))
    said = await talk(
        guest, "good.test",
        b"POST / HTTP/1.1\r\nHost: good.test\r\nAUTHORIZATION: own-1\r\nauthorization: own-2\r\n"
        b"Connection: authorization, keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1\r\nx\r\n0\r\nAuthorization: own-3\r\n\r\n"
        b"GET /next HTTP/1.1\r\nHost: good.test\r\nConnection: close\r\n\r\n",
    )  # fmt: skip
    assert said.count(f"Authorization: Bearer {SECRET}") == 2
    assert "own-" not in said
    assert "Connection: keep-alive" in said
    assert '"target": "/next"' in said


async def test_a_first_message_that_comes_late_meets_the_rules_of_then(guest: Lab) -> None:
    guest.restrict(injecting("good.test", egress="allow"), credentials(bearer()))
    script = """
import socket, sys
with socket.create_connection((sys.argv[1], 443), timeout=30) as there:
    there.sendall(b"\\x16\\x03\\x01")
    print("up", flush=True)
    input()
    try:
        there.sendall(b"GET / HTTP/1.1\\r\\nHost: bad.test\\r\\n\\r\\n")
        print("read", there.recv(100)[:1])
    except OSError as error:
        print(type(error).__name__)
"""
    client = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", guest.name, sys.executable, "-c", script, BAD,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert client.stdout is not None
    async with asyncio.timeout(60):
        assert await client.stdout.readline() == b"up\n"
        guest.restrict(injecting("good.test"), credentials(bearer()))
        said, _ = await client.communicate(b"\n")
    assert said.strip() in (b"ConnectionResetError", b"read b''", b"read b'\\x15'"), said
    assert {one["verdict"] for one in guest.journal()} <= {"refused", "allowed"}
    assert all(one.get("bytesIn", 0) == 0 for one in guest.journal())


async def test_an_inspected_host_cannot_be_a_front_for_others(guest: Lab) -> None:
    rules = injecting(inspect=("good.test",))
    guest.restrict(rules, credentials())
    said = await fetch(guest, "https://good.test/", "-H", "Authorization: Bearer own")
    assert "Bearer own" in said, "nothing is injected"
    said = await fetch(guest, "https://good.test/", "-H", "Host: other.test", "-i")
    assert "HTTP/1.1 421 " in said
    # Without inspection this is what passes.
    guest.restrict(policy("good.test"))
    said = await guest.curl("-k", "https://good.test/", "-H", "Host: other.test")
    assert "Host: other.test" in said


async def test_everything_else_passes_where_nothing_is_denied(guest: Lab) -> None:
    script = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.settimeout(3)
    udp.connect((sys.argv[1], int(sys.argv[2])))
    try:
        udp.send(b"x")
        udp.recv(9)
    except OSError as error:
        print(error.errno)
"""
    guest.restrict(injecting("good.test", egress="allow"), credentials(bearer()))
    assert SECRET in await fetch(guest, "https://good.test/")
    own = str(guest.outside / "certificate.pem")
    assert OTHER in await guest.curl("--cacert", own, "https://other.test/")
    assert BAD in await guest.curl("-k", "https://bad.test/")
    assert BAD in await guest.curl("-k", f"https://{BAD}/"), "without a server name"
    assert BAD in await guest.curl("http://bad.test/")
    # QUIC would pass by: it is refused at once, so that clients fall back.
    assert await guest.quic("other.test", OTHER, limit_s=3) == "unanswered"
    assert (await guest.python(script, OTHER, "443")).strip() == "113", "no route: prohibited"
    assert (await guest.python(script, OTHER, "444")).strip() == "111", "its kernel's own refusal"


async def test_secrets_outlive_the_server_and_come_again_after_the_process(guest: Lab) -> None:
    rules = injecting("good.test")
    guest.restrict(rules, credentials(bearer()))
    [pid] = await guest.pids()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while SECRET not in await fetch(guest, "https://good.test/", "--max-time", "3"):
            await asyncio.sleep(0.05)
    guest.keeper.end(kill=True)
    assert SECRET in await fetch(guest, "https://good.test/")
    guest.keep_anew()
    assert guest.restrict(rules) == "one", "the process has kept them"
    assert SECRET in await fetch(guest, "https://good.test/")
    # A process that comes after it has none, which the server tells.
    [pid] = await guest.pids()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while guest.keeper.ask("stamp") == "one":
            await asyncio.sleep(0.05)
    guest.restrict(rules, credentials(bearer()))
    # With both gone there are none, until they are sent again.
    guest.keeper.end(kill=True)
    [pid] = await guest.pids()
    os.kill(pid, signal.SIGKILL)
    guest.keep_anew()
    assert guest.restrict(rules) == ""
    assert '"at"' not in await fetch(guest, "https://good.test/")
    assert guest.restrict(rules, credentials(bearer())) == "one"
    assert SECRET in await fetch(guest, "https://good.test/")
    # They are those of their rules: others wait for their own.
    others = replace(injecting("good.test", "other.test"), stamp="three")
    assert guest.restrict(others) == ""
    assert '"at"' not in await fetch(guest, "https://good.test/")
    # Rules that end no TLS leave none behind.
    guest.restrict(rules, credentials(bearer()))
    guest.restrict(policy("good.test"))
    assert guest.restrict(rules) == ""


async def test_secrets_are_in_no_file_and_in_no_other_process(guest: Lab) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer()))
    assert SECRET in await fetch(guest, "https://good.test/")
    wanted = SECRET.encode()
    assert files_with(wanted, guest.home) == []
    [pid] = await guest.pids()
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid():
            for name in ("cmdline", "environ"):
                try:
                    assert wanted not in (process / name).read_bytes(), process
                except OSError:
                    continue
    assert list(Path(f"/proc/{pid}/root").iterdir()) == [], "nor is a key of a host's left there"


async def test_clients_that_do_not_trust_the_authority_are_told(guest: Lab) -> None:
    guest.restrict(injecting("good.test"), credentials(bearer()))
    own = str(guest.outside / "certificate.pem")
    assert "certificate" in await guest.curl("--cacert", own, "https://good.test/")
    assert guest.journal(1)[-1]["rule"] == "the client does not accept the certificate"


def test_certificates_are_valid_for_a_clock_that_is_late(tmp_path: Path) -> None:
    from cryptography import x509

    from sandyard.server.egress.tls import Issuer

    issuer = Issuer(CERTIFICATE, KEY, folder=tmp_path)
    assert isinstance(issuer.context("a.test"), ssl.SSLContext)
    assert issuer.context("a.test") is issuer.context("a.test")
    assert list(tmp_path.iterdir()) == []
    authority = x509.load_pem_x509_certificate(CERTIFICATE.encode())
    made = x509.load_pem_x509_certificate(issuer._issued("a.test", datetime.now(UTC)))
    made.verify_directly_issued_by(authority)
    for one in (authority, made):
        assert (datetime.now(UTC) - one.not_valid_before_utc).total_seconds() > 1.9 * 86_400
