"""A lab for network rules: a slot, a guest's network on its tap, and a world outside.

    python -m tests.support.egress carry SLOT GUEST        carries frames between two namespaces
    python -m tests.support.egress keep HOME SLOT CA ALLOW…   is the server: it keeps a slot

A keeper reads requests as JSON lines, and answers each with one. It can be killed, and another can
take over the slot.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sandyard.server.core.codec import decode, encode
from sandyard.server.core.egress import NO_RULES, Credentials, Egress, Policy, checked
from sandyard.server.core.errors import SandyardError
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.namespaces import open_tap, path_of
from sandyard.server.drivers.processes import all_of
from sandyard.server.egress.journal import Line
from sandyard.server.node.host.egress import read_journal
from sandyard.server.node.host.firewall import GATEWAY_IP, GUEST_IP
from sandyard.server.node.host.identity import give_back_identity, take_identity
from sandyard.server.node.host.network import Slots, host_routes, remove_host_rules
from sandyard.server.tasks import Crew
from tests.support.lab import ip
from tests.support.world import ADDRESSES, BAD, GOOD, OTHER, PRIVATE, RESOLVER

WORLD, GUEST = "syd-test-out", "syd-test-guest"
_HERE, _THERE = "10.213.78.1", "10.213.78.2"
ZONE: dict[str, Any] = {
    "good.test": {"A": [GOOD]},
    "bad.test": {"A": [BAD]},
    "other.test": {"A": [OTHER]},
    "*.good.test": {"A": [GOOD]},
    "private.test": {"A": [PRIVATE]},
    "mixed.test": {"A": [PRIVATE, GOOD]},
    "alias.test": {"CNAME": "good.test"},
    "large.test": {"A": [GOOD], "TRUNCATED": True},
    "wrong.example": {"A": [GOOD]},
    "expired.test": {"A": [BAD]},
}


def policy(*allow: str, deny: tuple[str, ...] = (), egress: str = "deny") -> Policy:
    """Return a policy in its plain form."""
    return checked(Policy(Egress(egress), allow, deny))


@contextmanager
def namespace(name: str) -> Iterator[None]:
    """A network namespace with its loopback up."""
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        ip("netns", "del", name)


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program of tests that says when it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def world(folder: Path) -> Iterator[None]:
    """A world with the servers of `tests.support.world`."""
    (folder / "zone.json").write_text(json.dumps(ZONE))
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=world", "-addext", "subjectAltName=DNS:good.test,DNS:*.good.test,DNS:other.test",
         "-keyout", folder / "key.pem", "-out", folder / "certificate.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    expired = _expired(folder)
    (folder / "trusted.pem").write_bytes((folder / "certificate.pem").read_bytes() + expired)
    with ExitStack() as held:
        held.enter_context(namespace(WORLD))
        # A namespace's links go some time after it.
        subprocess.run(["ip", "link", "del", "egrtest0"], capture_output=True, check=False)
        held.callback(ip, "link", "del", "egrtest0")
        ip("link", "add", "egrtest0", "type", "veth", "peer", "name", "w0", "netns", WORLD)
        ip("address", "add", f"{_HERE}/30", "dev", "egrtest0")
        ip("link", "set", "egrtest0", "up")
        ip("-n", WORLD, "address", "add", f"{_THERE}/30", "dev", "w0")
        ip("-n", WORLD, "link", "set", "w0", "up")
        ip("-n", WORLD, "route", "add", "default", "via", _HERE)
        for address in ADDRESSES:
            ip("-n", WORLD, "address", "add", f"{address}/32", "dev", "lo")
            ip("route", "add", f"{address}/32", "via", _THERE)
        held.enter_context(
            running(
                "ip", "netns", "exec", WORLD, sys.executable, "-m", "tests.support.world",
                str(folder),
            )
        )  # fmt: skip
        yield


def _expired(folder: Path) -> bytes:
    """Write a certificate that was valid until yesterday, with its key, and return it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "world of yesterday")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("expired.test")]), critical=False)
        .sign(key, hashes.SHA256())
    ).public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "expired.pem").write_bytes(made + private)
    return made


class Keeper:
    """A process that keeps a slot, as a server does; hosts are checked by `trusted`, too."""

    def __init__(
        self, home: Path, *, trusted: Path, slot: int = -1, allow: tuple[str, ...] = ()
    ) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.support.egress", "keep", home, str(slot), trusted,
                *allow,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said

    def ask(self, do: str, **given: object) -> str:
        """Have something done, and return what came of it.

        Raises:
            RuntimeError: it failed; the message says how.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer["error"] is not None:
            raise RuntimeError(answer["error"])
        return answer["stamp"] or ""

    def end(self, *, kill: bool = False) -> None:
        """End it: the slot stays if it is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if kill:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@dataclass
class Lab:
    """A guest in a slot. `folder` is that of its machine, `outside` the world's."""

    keeper: Keeper
    home: Path
    outside: Path
    name: str = GUEST
    zone: dict[str, Any] = field(default_factory=lambda: dict(ZONE))
    _seen: int = 0

    @property
    def folder(self) -> Path:
        """The folder of its machine."""
        return self.home / "machine"

    @property
    def netns(self) -> str:
        """The namespace of its slot."""
        return str(self.keeper.about["netns"])

    @property
    def uid(self) -> int:
        """The account of its egress process."""
        return int(self.keeper.about["uid"])

    async def pids(self) -> list[int]:
        """Return its egress processes."""
        found = await all_of(self.uid, path_of(self.netns), is_hidden=True)
        for one in found:
            one.close()
        return [one.pid for one in found]

    def restrict(self, rules: Policy, credentials: Credentials | None = None) -> str:
        """Put rules in force; return the stamp of the credentials that are in force with them."""
        return self.keeper.ask("restrict", policy=encode(rules), credentials=encode(credentials))

    def keep_anew(self) -> None:
        """Have the slot kept by another server; the former was killed."""
        slot = int(self.keeper.about["slot"])
        self.keeper = Keeper(self.home, trusted=self.outside / "trusted.pem", slot=slot)

    def resolves(self, **entries: dict[str, Any]) -> None:
        """Change names, beside those that are always there; `_` stands for a dot."""
        self.zone = ZONE | {name.replace("_", "."): entry for name, entry in entries.items()}
        part = self.outside / "zone.part"
        part.write_text(json.dumps(self.zone))
        part.replace(self.outside / "zone.json")

    def begin(self) -> None:
        """Forget what is in the journal, and the names of the test before."""
        # Its process ends, so that no connection of that test is written to the journal later.
        self.restrict(NO_RULES)
        self._seen = len(read_journal(self.folder, now=0))
        self.resolves()

    def journal(self, count: int = 0) -> list[Line]:
        """Return the lines of the journal since then, once there are `count` at least: one is
        written when both ends of a connection have ended."""
        until = time.monotonic() + 30
        while len(lines := read_journal(self.folder, now=0)[self._seen :]) < count:
            assert time.monotonic() < until, lines
            time.sleep(0.02)
        return lines

    async def run(self, *command: str, stdin: str = "") -> str:
        """Run a command in the guest's network; return what it printed, and its exit code if that
        is not 0."""
        process = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", self.name, *command, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(60):
            said, _ = await process.communicate(stdin.encode())
        failed = f" (exit {process.returncode})" if process.returncode else ""
        return said.decode(errors="replace") + failed

    async def curl(self, *arguments: str) -> str:
        """Run curl in the guest's network."""
        return await self.run("curl", "-sS", "--max-time", "40", *arguments)

    async def quic(self, name: str, address: str, *, limit_s: float) -> str:
        """Run a client of QUIC in the guest's network; see tests.support.quic."""
        command = (sys.executable, "-m", "tests.support.quic", name, address, str(limit_s))
        return (await self.run(*command)).strip()

    async def python(self, script: str, *arguments: str) -> str:
        """Run a script in the guest's network."""
        return await self.run(sys.executable, "-", *arguments, stdin=script)


@contextmanager
def lab(
    home: Path, outside: Path, *, allow: tuple[str, ...] = (), name: str = GUEST
) -> Iterator[Lab]:
    """A lab whose world is in `outside`, and whose guest's namespace has a `name`."""
    home.chmod(0o755)
    (home / "machine").mkdir()
    resolver = Path("/etc/netns") / name / "resolv.conf"
    with ExitStack() as held:
        keeper = Keeper(home, trusted=outside / "trusted.pem", allow=allow)
        made = Lab(keeper, home, outside, name)
        held.callback(lambda: made.keeper.end())
        resolver.parent.mkdir(parents=True, exist_ok=True)
        held.callback(resolver.parent.rmdir)
        resolver.write_text(f"nameserver {GATEWAY_IP}\noptions timeout:5 attempts:4\n")
        held.callback(resolver.unlink)
        held.enter_context(namespace(name))
        ip("-n", name, "tuntap", "add", "dev", "eth0", "mode", "tap")
        carrier = [sys.executable, "-m", "tests.support.egress", "carry", made.netns, name]
        held.enter_context(running(*carrier))
        ip("-n", name, "link", "set", "eth0", "address", str(made.keeper.about["mac"]))
        ip("-n", name, "address", "add", f"{GUEST_IP}/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "route", "add", "default", "via", GATEWAY_IP)
        yield made


def _carry(source: int, target: int) -> None:
    while True:
        frame = os.read(source, 70_000)
        try:
            os.write(target, frame)
        except OSError:  # the other end is not up yet
            continue


async def carry(slot: str, guest: str) -> None:
    """Carry frames until killed."""
    taps = [await open_tap(slot, "tap0"), await open_tap(guest, "eth0")]
    for one in taps:
        os.set_blocking(one, True)
    threads = [
        threading.Thread(target=_carry, args=pair, daemon=True) for pair in (taps, taps[::-1])
    ]
    for thread in threads:
        thread.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    threading.Event().wait()


async def keep(home: Path, slot: int, trusted: Path, allow: list[str]) -> None:
    """Keep a slot until there are no more requests: a new one, or that of an earlier keeper."""
    identity = take_identity(home, routes=await host_routes())
    async with AsyncExitStack() as held:
        held.callback(give_back_identity, home)
        held.push_async_callback(remove_host_rules, identity)
        crew = await held.enter_async_context(Crew())
        slots = Slots(identity, home=home, allow=allow, resolvers=[RESOLVER], extra_ca=trusted)
        await slots.open(in_use=[] if slot < 0 else [slot], crew=crew)
        held.push_async_callback(slots.close)
        place = await slots.take() if slot < 0 else slots.place(slot)
        held.push_async_callback(slots.give_back, place)
        about = {"netns": place.netns, "mac": place.mac, "ip": place.ip, "slot": place.number,
                 "uid": identity.egress_uids[place.number]}  # fmt: skip
        _say(about)
        parent = slots._egress._parent
        mended = parent.fork

        async def broken(*_: object) -> None:
            raise OSError("no more processes")

        while line := await asyncio.to_thread(sys.stdin.readline):
            asked, error, stamp = json.loads(line), None, None
            if asked["do"] == "restrict":
                try:
                    rules = decode(Policy, asked["policy"])
                    credentials = (
                        decode(Credentials, given) if (given := asked["credentials"]) else None
                    )
                    await slots.restrict(
                        place, rules, folder=home / "machine", credentials=credentials
                    )
                    stamp = slots.stamp(place)
                except SandyardError as refused:
                    error = refused.message
            elif asked["do"] == "many":
                stamp = await _many(slots, home, asked["count"])
            elif asked["do"] == "stamp":
                stamp = slots.stamp(place)
            else:
                setattr(parent, "fork", broken if asked["do"] == "break" else mended)  # noqa: B010
            _say({"error": error, "stamp": stamp})


async def _many(slots: Slots, home: Path, count: int) -> str:
    """Restrict so many more slots at once, and return as JSON how long each took, in ms, and the
    memory of their processes (PSS), in MiB."""
    loop, uids = asyncio.get_running_loop(), slots._identity.egress_uids
    rules = policy("good.test")

    async def restrict(place: Place) -> float:
        folder = home / f"many-{place.number}"
        folder.mkdir()
        began = loop.time()
        await slots.restrict(place, rules, folder=folder)
        return 1000 * (loop.time() - began)

    places = [await slots.take() for _ in range(count)]
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(restrict(one)) for one in places]
        memory = []
        for place in places:
            for one in await all_of(uids[place.number], path_of(place.netns), is_hidden=True):
                one.close()
                memory.append(pss_mib(one.pid))
    finally:
        for place in places:
            await slots.give_back(place)
    return json.dumps({"ms": [one.result() for one in started], "mib": memory})


def pss_mib(pid: int) -> float:
    """Return the memory of a process, its part of what is shared included, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(one.split()[1]) for one in lines if one.startswith("Pss:")) / 1024


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "carry":
        asyncio.run(carry(*sys.argv[2:]))
    else:
        asyncio.run(keep(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:]))
