"""Several hosts on this one: network namespaces on a bridge, with an installation's parts in them.

10.203.250.1       this process
10.203.250.11…     NATS servers
10.203.250.20      PostgreSQL
10.203.250.30      the balancer
10.203.250.41…     control planes
10.203.250.51…     nodes
"""

import asyncio
import contextlib
import glob
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from sandyard.server.app.admin import ensure_key
from sandyard.server.app.cluster import invite_line, open_fleet, write_nats_config
from sandyard.server.app.installation import secret_key, ssh_host_key
from sandyard.server.app.settings import Settings
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.records import JoinedNode
from sandyard.server.links.sql import open_store
from tests.support.images import cache_environment, one_at_a_time
from tests.support.server import SANDYARD, longer, wait_until

NET = "10.203.250"
PREVIEWS, HOST_KEY = "preview.test", "ssh_host_ed25519_key"
_TOKEN = "a token for metrics"
API, SSH, DOOR, NATS, NATS_CLUSTER, METRICS, DATABASE = 8080, 2222, 8700, 4222, 6222, 9200, 5432
_NATS, _POSTGRES, _BALANCER, _CONTROLS, _NODES = 11, 20, 30, 41, 51


def ip(*words: str | int) -> None:
    """Run iproute2."""
    command = ["ip", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@dataclass
class Host:
    """A namespace, and what runs in it."""

    name: str
    number: int
    prefix: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    started: tuple[str, ...] = ()
    is_real: bool = False

    @property
    def address(self) -> str:
        """Its address."""
        return f"{NET}.{self.number}"

    @property
    def netns(self) -> str:
        """Its namespace."""
        return f"{self.prefix}-{self.name}"

    @property
    def cable(self) -> str:
        """This end of its cable."""
        return f"{self.prefix}{self.number}"

    def plug_in(self, bridge: str) -> None:
        """Make it, on a bridge."""
        ip("netns", "add", self.netns)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.netns)
        ip("link", "set", self.cable, "master", bridge, "up")
        ip("-n", self.netns, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", self.netns, "link", "set", device, "up")

    def start(self, *command: str | Path, user: str | None = None) -> None:
        """Start its program; with `user`, as that account."""
        self.started = tuple(map(str, command))
        self.home.mkdir(exist_ok=True)
        # What else this host does is not to be taken for a bad day of theirs.
        first = ["nice", "-n", "-10"] if os.geteuid() == 0 and not self.is_real else []
        enter = [*first, "nsenter", f"--net=/run/netns/{self.netns}"]
        if user is not None and os.geteuid() == 0:
            enter += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        with (self.home.parent / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*enter, *self.started], env={**os.environ, **self.environment}, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.home.parent,
            )  # fmt: skip

    def run(self, *command: str | Path) -> str:
        """Run a command to its end, beside its program, and return what it printed."""
        self.home.mkdir(exist_ok=True)
        enter = ["nsenter", f"--net=/run/netns/{self.netns}"]
        done = subprocess.run(
            [*enter, *map(str, command)], env={**os.environ, **self.environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=longer(300),
        )  # fmt: skip
        return done.stdout

    def hang_all(self) -> None:
        """Have its program stand still, with all that it started."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on_all(self) -> None:
        """Have all of it go on."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send its program a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End its program at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def stop(self) -> None:
        """End its program in an orderly way."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
            self.process = None

    def cut(self, *ports: int) -> None:
        """Cut it off: from everything, or from what others serve at these ports."""
        if not ports:
            ip("link", "set", self.cable, "down")
            return
        drops = "".join(f"tcp dport {port} drop\n" for port in ports)
        chain = f"chain out {{\ntype filter hook output priority 0\n{drops}}}"
        self._nft(f"table inet cut {{\n{chain}\n}}\n")

    def heal(self) -> None:
        """Undo every cut."""
        ip("link", "set", self.cable, "up")
        self._nft("table inet cut {}\ndelete table inet cut")

    def _nft(self, rules: str) -> None:
        enter = ["nsenter", f"--net=/run/netns/{self.netns}", "nft", "-f", "-"]
        subprocess.run(enter, input=rules.encode(), check=True, capture_output=True, timeout=20)

    def said(self) -> str:
        """Return what its program wrote."""
        return (self.home.parent / f"{self.name}.log").read_text(errors="replace")


class NoPlaceError(AssertionError):
    """No node took a sandbox at this moment."""


class Lab:
    """An installation on several hosts; see the module."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.nats = [self._host(f"nats{one}", _NATS + one) for one in range(3)]
        self.postgres = self._host("postgres", _POSTGRES)
        self.balancer = self._host("balancer", _BALANCER)
        self.controls = [self._control(one) for one in range(2)]
        self.nodes: dict[str, Host] = {}
        self.client = httpx.Client()

    def _host(self, name: str, number: int, **environment: str) -> Host:
        return Host(name, number, self.prefix, self.folder / name, environment)

    @property
    def hosts(self) -> list[Host]:
        """All of them."""
        return [
            *self.nodes.values(), *self.controls, self.balancer, *self.nats, self.postgres
        ]  # fmt: skip

    @property
    def url(self) -> str:
        """The database's URL."""
        return f"postgresql://postgres@{self.postgres.address}/postgres"

    @property
    def servers(self) -> list[str]:
        """Where NATS is."""
        return [f"tls://{one.address}:{NATS}" for one in self.nats]

    @property
    def settings(self) -> Settings:
        """What the first control plane's host has for settings, for its operator's commands."""
        return Settings(
            home=self.folder / "control0",
            store={"url": self.url},
            cluster={"nats": self.servers, "address": self.controls[0].address, "port": DOOR},
        )

    def _control(self, one: int) -> Host:
        host = self._host(f"control{one}", _CONTROLS + one)
        quoted = ", ".join(f'"{server}"' for server in self.servers)
        host.environment = {
            "SANDYARD_HOME": str(host.home),
            "SANDYARD_STORE__URL": self.url,
            "SANDYARD_HTTP__HOST": host.address,
            "SANDYARD_HTTP__PUBLIC_URL": f"http://{self.balancer.address}:{API}",
            "SANDYARD_HTTP__TRUSTED_PROXIES": f'["{self.balancer.address}"]',
            "SANDYARD_SSH__PORT": str(SSH),
            "SANDYARD_PREVIEW__DOMAIN": f"{PREVIEWS}:{API}",
            "SANDYARD_HTTP__METRICS_TOKEN": _TOKEN,
            "SANDYARD_CLUSTER__NATS": f"[{quoted}]",
            "SANDYARD_CLUSTER__HOST": host.address,
        }
        return host

    # --- its parts ------------------------------------------------------------------------

    def start_postgres(self) -> None:
        """Start the database."""
        programs = Path(sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))[-1]).parent
        host, data = self.postgres, self.postgres.home / "data"
        host.home.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(host.home, "postgres", "postgres")
        if not data.exists():
            account = pwd.getpwnam("postgres")
            subprocess.run(
                [programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"],
                check=True, capture_output=True, timeout=60, cwd=host.home,
                user=account.pw_uid, group=account.pw_gid,
            )  # fmt: skip
            with (data / "pg_hba.conf").open("a") as file:
                file.write(f"host all all {NET}.0/24 trust\n")
        options = {"listen_addresses": host.address, "unix_socket_directories": "", "fsync": "off"}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        host.start(programs / "postgres", "-D", data, *words, user="postgres")

    def start_nats(self) -> None:
        """Start every NATS server that does not run."""
        for host in self.nats:
            if host.process is None:
                host.start("nats-server", "-c", host.home / "nats.conf")

    def configure_nats(self) -> None:
        """Write what they are started with, as `sandyard admin nats-config` does."""
        for host in self.nats:
            routes = tuple(
                f"tls://{one.address}:{NATS_CLUSTER}" for one in self.nats if one is not host
            )
            asyncio.run(
                write_nats_config(
                    self.settings, host.home, host=host.address, addresses=(), port=NATS,
                    routes=routes, cluster_port=NATS_CLUSTER, name=host.name,
                )
            )  # fmt: skip

    def start_balancer(self) -> None:
        """Start what spreads requests over the control planes, one after the other."""
        host = self.balancer
        host.home.mkdir(exist_ok=True)
        servers = "\n".join(
            f"  server {one.name} {one.address}:{API} check inter 500ms fall 2 rise 1"
            for one in self.controls
        )
        gateways = "\n".join(
            f"  server {one.name} {one.address}:{SSH} check port {API} inter 500ms fall 2 rise 1"
            for one in self.controls
        )
        (host.home / "haproxy.cfg").write_text(
            f"""defaults
  mode http
  timeout connect 2s
  timeout client 300s
  timeout server 300s
  timeout tunnel 1h
  option redispatch
  option forwardfor
  retries 3
frontend api
  bind {host.address}:{API}
  default_backend controls
backend controls
  balance roundrobin
  option httpchk GET /servez
  http-reuse never
{servers}
frontend ssh
  mode tcp
  bind {host.address}:{SSH}
  timeout client 24h
  default_backend gateways
backend gateways
  mode tcp
  timeout server 24h
  option httpchk GET /servez
{gateways}
"""
        )
        host.start("haproxy", "-f", host.home / "haproxy.cfg")

    def start_control(self, one: int) -> None:
        """Start a control plane."""
        self.controls[one].start(SANDYARD, "control")

    def add_node(
        self, name: str, *, is_real: bool = False, builds: str = "base-minimal", **environment: str
    ) -> Host:
        """Make a host a node by an invite, and start it; one that `is_real` has real machines, and
        `builds` a template, if any."""
        host = self._host(name, _NODES + len(self.nodes))
        host.is_real = is_real
        host.environment = {
            **cache_environment(),
            "SANDYARD_HOME": str(host.home),
            "SANDYARD_NODE__DRIVER": "auto" if is_real else "fake",
            "SANDYARD_CLUSTER__METRICS_PORT": str(METRICS),
            "SANDYARD_CLUSTER__HOST": host.address,
            **environment,
        }
        if not builds:
            host.environment["SANDYARD_NODE__IMAGES_DIR"] = str(host.home / "images")
        elif is_real:  # not from in there: it may have to fetch packages
            with one_at_a_time():
                subprocess.run(
                    [SANDYARD, "template", "build", builds], check=True,
                    capture_output=True, env={**os.environ, **host.environment},
                    timeout=longer(300),
                )  # fmt: skip
        host.plug_in(self.prefix)
        self.nodes[name] = host
        _, invite, _, *line = asyncio.run(invite_line(self.settings)).split()
        kept = host.home.parent / f"{name}.invite"
        kept.write_text(invite)
        host.start(SANDYARD, *line[1:], "--invite-file", str(kept), "--name", name)
        return host

    def start_node(self, name: str) -> None:
        """Start a node that has joined."""
        self.nodes[name].start(SANDYARD, "node")

    def restart_with_clock(self, host: Host, ahead: str) -> None:
        """Start the program of a control plane, a node or the database anew, with its clock ahead
        by so much, such as -1h; +0 puts it right."""
        (library,) = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
        faked = {"LD_PRELOAD": library, "FAKETIME": ahead, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        words = host.started
        if host is self.postgres:
            host.signal(signal.SIGINT)
            assert host.process is not None
            host.process.wait(30)
            # Not for what starts it: as another user it could not open what that shares.
            first = (
                () if ahead == "+0" else ("env", *(f"{one}={two}" for one, two in faked.items()))
            )
            host.start(*first, *words, user="postgres")
            host.started = words
            return
        host.kill()
        for name in faked:
            host.environment.pop(name, None)
        if ahead != "+0":
            host.environment |= faked
        host.start(*(words if host in self.controls else (str(SANDYARD), "node")))

    # --- what is seen of it ---------------------------------------------------------------

    def known(self) -> dict[str, JoinedNode]:
        """Return the nodes by name, as the database has them."""

        async def known() -> dict[str, JoinedNode]:
            async with open_fleet(self.settings) as (fleet, _):
                return {one.name: one for one in await fleet.nodes()}

        return asyncio.run(known())

    def until_up(self, *names: str) -> None:
        """Return once nodes have a lease, and control planes that answer."""

        def up() -> bool:
            try:
                found = self.known()
            except UnavailableError:
                return False
            return all(name in found and found[name].has_lease for name in names or self.nodes)

        try:
            wait_until(up, limit_s=120, what=f"{names or 'all nodes'} are up")
            wait_until(self.is_ready, limit_s=60, what="the control planes are ready")
        except AssertionError as error:
            said = "\n".join(f"--- {one.name}\n{one.said()[-1500:]}" for one in self.hosts)
            raise AssertionError(f"{error}\n{said}") from None

    def losses(self) -> int:
        """Return how often a control plane has given a node up."""
        return sum(one.said().count("missed its lease") for one in self.controls)

    def is_ready(self) -> bool:
        """Tell whether every control plane that runs can serve."""
        for one in self.controls:
            if one.process is None:
                continue
            try:
                answer = httpx.get(f"http://{one.address}:{API}/readyz", timeout=5)
            except httpx.HTTPError:
                return False
            if answer.status_code != 200:
                return False
        return True

    def ask(self, method: str, path: str, **body: object) -> Any:
        """Ask through the balancer for something that succeeds, and return what is answered."""
        found = self.client.request(method, path, json=body or None)
        if found.status_code == 503 and "no node that answers can start one" in found.text:
            raise NoPlaceError(found.text)
        assert found.status_code < 300, found.text
        return found.json()["data"]

    def get_from(self, control: Host, path: str) -> str:
        """Return what one control plane answers."""
        headers = dict(self.client.headers)
        if path == "/metrics":
            headers["authorization"] = f"Bearer {_TOKEN}"
        url = f"http://{control.address}:{API}{path}"
        return httpx.get(url, headers=headers, timeout=60).raise_for_status().text

    def create(self, **body: object) -> dict[str, Any]:
        """Create a sandbox that is used by nobody in particular."""
        made: dict[str, Any] = self.ask(
            "POST",
            "/v1/sandboxes?wait=60",
            **{"template": "base-minimal", "idleTimeout": 0, **body},
        )
        return made

    def on(self, name: str, **body: object) -> dict[str, Any]:
        """Create a sandbox on one node: the others are drained meanwhile."""
        self.drain({one for one in self.known() if one != name})
        time.sleep(0.7)  # until every control plane has read it
        made: list[dict[str, Any]] = []

        def is_placed() -> bool:
            # A node that has just started again may miss a lease on a busy host.
            with suppress(NoPlaceError):
                made.append(self.create(**body))
            return bool(made)

        try:
            wait_until(is_placed, limit_s=15, what=f"{name} takes a sandbox")
            return made[0]
        finally:
            self.keep_real_apart()

    def keep_real_apart(self) -> None:
        """Have nothing placed on real nodes unasked: they take much longer than fake ones."""
        self.drain({name for name, host in self.nodes.items() if host.is_real})

    def drain(self, names: set[str]) -> None:
        """Have nothing new come to these nodes, and to all others again."""
        known = self.known()

        async def drained() -> None:
            async with open_fleet(self.settings) as (fleet, _):
                for one in known:
                    await fleet.drain(one, is_draining=one in names)

        asyncio.run(drained())

    def nodes_of(self, sandboxes: list[dict[str, Any]]) -> set[str]:
        """Return the names of the nodes that sandboxes are on."""

        async def placed() -> set[str | None]:
            key = secret_key(self.controls[0].home)
            async with open_store(self.url, key=key) as store, store.read() as tx:
                found = [await tx.sandboxes.find(one["id"]) for one in sandboxes]
                return {None if one is None else one.node_id for one in found}

        names = {one.id: name for name, one in self.known().items()}
        return {names.get(one or "", "none") for one in asyncio.run(placed())}

    def overlapping_periods(self) -> int:
        """Return how many pairs of periods of use of one sandbox overlap: it would pay twice."""

        async def counted() -> int:
            connection = await asyncpg.connect(self.url)
            try:
                found: int = await connection.fetchval(
                    "SELECT count(*) FROM usage_periods a JOIN usage_periods b USING (sandbox_id) "
                    "WHERE a.id < b.id AND (b.ended_at IS NULL OR a.started_at < b.ended_at) "
                    "AND (a.ended_at IS NULL OR b.started_at < a.ended_at)"
                )
                return found
            finally:
                await connection.close()

        return asyncio.run(counted())

    def machines(self) -> list[str]:
        """Return the sandboxes of all machines that nodes have on record, sorted."""
        found = []
        for node in self.nodes.values():
            for path in (node.home / "machines").glob("*/resident.json"):
                with contextlib.suppress(FileNotFoundError, ValueError):
                    found.append(json.loads(path.read_text())["sandbox_id"])
        return sorted(one for one in found if one)

    def try_create(self) -> int:
        """Try to create a sandbox, and return the HTTP status."""
        body = {"template": "base-minimal", "idleTimeout": 0}
        return self.client.post("/v1/sandboxes?wait=60", json=body).status_code

    def try_status(self, sandbox: dict[str, Any]) -> str:
        """Return a sandbox's status, nothing if nobody can tell now."""
        with contextlib.suppress(AssertionError, httpx.HTTPError):
            return self.status(sandbox)
        return ""

    def status(self, sandbox: dict[str, Any]) -> str:
        """Return a sandbox's status."""
        return str(self.ask("GET", f"/v1/sandboxes/{sandbox['id']}")["status"])

    def until(self, sandbox: dict[str, Any], status: str, *, limit_s: float = 30.0) -> float:
        """Return how long it took until a sandbox had a status."""
        began = time.monotonic()
        wait_until(
            lambda: self.status(sandbox) == status, limit_s=limit_s,
            what=f"{sandbox['id']} is {status}",
        )  # fmt: skip
        return time.monotonic() - began

    def execute(self, sandbox: dict[str, Any], command: str) -> Any:
        """Run a command in a sandbox."""
        return self.ask("POST", f"/v1/sandboxes/{sandbox['id']}/exec", command=command)["stdout"]

    def try_execute(self, sandbox: dict[str, Any], command: str) -> str:
        """Run a command in a sandbox, and return nothing if that cannot be done now."""
        with contextlib.suppress(AssertionError, httpx.HTTPError):
            return str(self.execute(sandbox, command))
        return ""

    def delete(self, sandbox: dict[str, Any]) -> None:
        """Delete a sandbox."""
        self.client.delete(f"/v1/sandboxes/{sandbox['id']}").raise_for_status()


@contextmanager
def lab(*nodes: str, **environment: str) -> Iterator[Lab]:
    """Yield an installation with these nodes, which are up and have this in their environment; and
    leave nothing of it."""
    prefix = f"sl{os.getpid() % 100_000}"
    folder = Path(tempfile.mkdtemp(prefix="sy-lab-", dir="/tmp"))
    folder.chmod(0o711)
    made = Lab(folder, prefix)
    with ExitStack() as held:
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        ip("link", "add", prefix, "type", "bridge")
        held.callback(_quietly, ip, "link", "delete", prefix)
        ip("address", "add", f"{NET}.1/24", "dev", prefix)
        ip("link", "set", prefix, "up")
        held.callback(_take_down, made)
        for host in made.hosts:
            host.plug_in(prefix)
        made.start_postgres()
        for one in made.controls:
            one.home.mkdir()
        key = secret_key(made.controls[0].home)
        (made.controls[1].home / "secret.key").write_bytes(key)
        ssh_host_key(made.controls[0].home)
        shutil.copy(made.controls[0].home / HOST_KEY, made.controls[1].home / HOST_KEY)
        _until_database(made)
        made.configure_nats()
        made.start_nats()
        for number in range(len(made.controls)):
            made.start_control(number)
        made.start_balancer()
        api_key = asyncio.run(ensure_key(made.settings, None))
        made.client = held.enter_context(
            httpx.Client(
                base_url=f"http://{made.balancer.address}:{API}",
                headers={"Authorization": f"Bearer {api_key}"},
                timeout=100,
            )
        )
        wait_until(lambda: _answers(made), what="the control planes answer")
        for name in nodes:
            made.add_node(name, is_real=False, **environment)
        if nodes:  # without any they are not ready
            made.until_up()
        yield made


def main() -> None:
    """Have an installation to look at, until interrupted."""
    names = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    sys.stdout.write("starting fifteen hosts; it takes half a minute\n")
    with lab(*names) as made, contextlib.suppress(KeyboardInterrupt):
        control = made.controls[0]
        sys.stdout.write(f"""
The API, by the balancer:
  export SANDYARD_URL={made.client.base_url}
  export SANDYARD_API_KEY={made.client.headers["Authorization"].removeprefix("Bearer ")}
  .venv/bin/sandyard sandbox create --template base-minimal
Who is there, as an operator sees it:
  nsenter --net=/run/netns/{control.netns} env \\
    {" ".join(f"{name}='{value}'" for name, value in control.environment.items())} \\
    .venv/bin/sandyard admin node list
Cut a node's cable, and mend it:
  ip link set {made.nodes["one"].cable} down
  ip link set {made.nodes["one"].cable} up
What they say: {made.folder}/*.log
Ctrl-C takes it down.
""")
        sys.stdout.flush()
        signal.pause()


def _answers(made: Lab) -> bool:
    for one in made.controls:
        try:
            httpx.get(f"http://{one.address}:{API}/healthz", timeout=2)
        except httpx.HTTPError:
            return False
    return True


def _until_database(made: Lab) -> None:
    def answers() -> bool:
        try:
            made.known()
        except Exception:  # noqa: BLE001 - whatever it is, it is not there yet
            return False
        return True

    wait_until(answers, what="the database answers")


def _take_down(made: Lab) -> None:
    for host in made.hosts:
        with contextlib.suppress(Exception):
            if host.process is not None:
                host.signal(signal.SIGCONT)
        _quietly(host.heal)
        _quietly(host.stop if host.name in made.nodes else host.kill)
        _quietly(host.kill)
        if host.environment.get("SANDYARD_NODE__DRIVER") == "auto":
            _quietly(host.run, SANDYARD, "stop", "--all")
    for host in made.hosts:
        _quietly(ip, "netns", "delete", host.netns)


def _quietly(work: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        work(*args)


if __name__ == "__main__":
    main()
