"""Network slots: each is a namespace with a tap for one machine, created ahead and used once.

The guest has the same address in every slot, so that saved machines need no new one; on the host's
side each slot has its own address. A slot is not used again, because its connection table may
contain entries of the previous guest.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from typing_extensions import override

from sandyard.server.core.egress import Credentials, Policy, Rules
from sandyard.server.core.errors import (
    InternalError,
    NoCapacityError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.wire import AGENT_PORT
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.namespaces import in_namespace, path_of, socket_in
from sandyard.server.drivers.processes import kill_all_of, strangers, uids_at_work
from sandyard.server.egress.dns import Resolver
from sandyard.server.node.commands import run
from sandyard.server.node.host.dns import forward_dns, host_resolvers
from sandyard.server.node.host.egress import EgressProcesses, has_process
from sandyard.server.node.host.firewall import (
    GATEWAY_IP,
    GUEST_IP,
    NO_EGRESS_RULES,
    UNREACHABLE,
    egress_rules,
    exceptions_to_remove,
    forward_exceptions,
    guard_rules,
    host_rules,
    input_rules,
    new_neighbours,
    slot_rules,
)
from sandyard.server.node.host.identity import SLOTS, Identity
from sandyard.server.node.host.netlink import netlink
from sandyard.server.tasks import Crew, Task, in_thread

log = logging.getLogger(__name__)

GUEST_MAC = "02:73:79:00:00:02"
_GATEWAY_MAC = "02:73:79:00:00:01"
_TAP, _UPLINK = "tap0", "up0"
_TOOL_LIMIT_S = 20.0
_SHOWN_MAX = 3
_SPARE = 3
_FOLLOW_S = 3.0


class Network(Protocol):
    """Slots for machines, and connections to the machines in them."""

    async def open(
        self, *, in_use: Iterable[int], crew: Crew, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare the host, keep the slots with these numbers, and remove all others. `on_change`
        is called when the stamp of a slot in use is another one without a change of its rules."""
        ...

    async def close(self) -> None:
        """Release unused slots; used ones stay, because machines keep running."""
        ...

    async def take(self) -> Place:
        """Return an unused slot.

        Raises:
            NoCapacityError: all are in use.
            InternalError: the host could not create one.
        """
        ...

    def place(self, number: int) -> Place:
        """Return the slot with this number."""
        ...

    async def restrict(
        self,
        place: Place,
        policy: Policy,
        *,
        folder: Path,
        credentials: Credentials | None = None,
    ) -> None:
        """Return once a slot's rules are in force: connections that they do not let pass have
        ended. `folder` is that of its machine, for the journal. Without `credentials` those that
        were given before stay in use, if they are still known.

        Raises:
            UnavailableError: what enforces them does not start. Then nothing passes.
            InternalError: the host does not take them. Then those of before are in force.
        """
        ...

    def stamp(self, place: Place) -> str | None:
        """Return the stamp of the credentials in use in a slot, if there are any."""
        ...

    async def give_back(self, place: Place) -> None:
        """Remove a slot with everything in it; does nothing if it does not exist."""
        ...

    async def dial(self, place: Place, port: int, *, folder: Path, limit_s: float) -> socket.socket:
        """Return a connection to a port of the machine in a slot.

        Raises:
            OSError: nothing answers.
        """
        ...


async def check_accounts(identity: Identity) -> None:
    """Return if no other installation's processes run under this one's accounts. One in a container
    may have the same, and each would end the other's machines.

    Raises:
        UnavailableError: some do; the message names them.
    """

    def netns_of(uid: int) -> Path:
        first = identity.uids if uid in identity.uids else identity.egress_uids
        return path_of(f"{identity.prefix}-{uid - first.start}")

    found = [
        pid
        for uids in (identity.uids, identity.egress_uids)
        for pid in await in_thread(strangers, uids, netns_of)
    ]
    if found:
        raise UnavailableError(
            "cannot start machines: processes of another installation run under this one's "
            f"accounts ({', '.join(map(str, sorted(found)[:_SHOWN_MAX]))}); end its machines, or, "
            "while this installation has none, remove instance.json from its home: then it takes "
            "other accounts"
        )


class Slots(Network):
    """See Network: the real thing."""

    def __init__(
        self,
        identity: Identity,
        *,
        home: Path,
        allow: Sequence[str] = (),
        resolvers: Sequence[str] = (),
        extra_ca: Path | None = None,
    ) -> None:
        """Prepare slots whose queries go to `resolvers`, by default to the host's. See
        `EgressProcesses` for `extra_ca`."""
        self._identity = identity
        self._allow = tuple(allow)
        self._used: set[int] = set()
        self._spare: list[Place] = []
        self._lock = asyncio.Lock()
        self._dns: dict[int, Task] = {}
        self._crew: Crew | None = None
        self._neighbours: tuple[str, ...] = ()
        chosen = [(one, 53) for one in resolvers]
        self._resolvers: Callable[[], Sequence[Resolver]] = (
            (lambda: chosen) if chosen else host_resolvers
        )
        self._egress = EgressProcesses(
            empty=home / "empty",
            uid_of=self._egress_uid,
            permitted=self._allow,
            resolvers=self._resolvers,
            extra_ca=extra_ca,
        )

    @override
    async def open(
        self, *, in_use: Iterable[int], crew: Crew, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._crew = crew
        self._used = set(in_use)
        await self._prepare_host()
        await self._sweep()
        self._egress.open(crew, on_change)
        for number in self._used:
            await self._guard(self.place(number))
        self._refill_in_background()
        following = self._follow_neighbours()
        crew.start(following, "the firewall no longer follows the host's networks")

    @override
    async def close(self) -> None:
        for task in self._dns.values():
            task.cancel()
        await self._egress.close()
        async with self._lock:
            while self._spare:
                await self._remove(self._spare.pop())

    @override
    async def take(self) -> Place:
        async with self._lock:
            place = self._spare.pop() if self._spare else await self._make()
            self._used.add(place.number)
        self._refill_in_background()
        return place

    @override
    async def restrict(
        self,
        place: Place,
        policy: Policy,
        *,
        folder: Path,
        credentials: Credentials | None = None,
    ) -> None:
        if policy.is_default:
            if self._egress.guards(place) or has_process(place, folder):
                await _nft_in(place, NO_EGRESS_RULES)
                await self._egress.stop(place, folder)
            if place.number not in self._dns:
                self._start_dns(place)
            return
        ranges = (tuple(map(ipaddress.IPv4Network, one)) for one in (UNREACHABLE, self._allow))
        await _nft_in(place, egress_rules(tap=_TAP, rules=Rules(policy, *ranges)))
        await self._stop_dns(place)
        await self._egress.apply(place, folder, policy, credentials)

    @override
    def stamp(self, place: Place) -> str | None:
        return self._egress.stamp(place)

    @override
    def place(self, number: int) -> Place:
        return Place(
            number=number,
            netns=f"{self._identity.prefix}-{number}",
            tap=_TAP,
            mac=GUEST_MAC,
            ip=str(self._outer(number)),
            uid=self._identity.uid_first + number,
        )

    @override
    async def give_back(self, place: Place) -> None:
        await self._stop_dns(place)
        await self._egress.stop(place)
        await kill_all_of(place.uid, path_of(place.netns))
        async with self._lock:
            await self._remove(place)
            self._used.discard(place.number)

    @override
    async def dial(self, place: Place, port: int, *, folder: Path, limit_s: float) -> socket.socket:
        connection = socket_in(place.netns)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(limit_s):
                await asyncio.get_running_loop().sock_connect(connection, (GUEST_IP, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def _egress_uid(self, place: Place) -> int:
        return self._identity.egress_uids[place.number]

    def _outer(self, number: int) -> ipaddress.IPv4Address:
        return self._identity.subnet[number * 4 + 2]

    def _host_link(self, number: int) -> str:
        return f"{self._identity.prefix}-{number:x}"

    async def _prepare_host(self) -> None:
        forward = Path("/proc/sys/net/ipv4/ip_forward")
        if forward.read_text().strip() != "1":
            forward.write_text("1")
        identity = self._identity
        self._neighbours = await _host_neighbours()
        rules = host_rules(
            table=identity.table,
            prefix=identity.prefix,
            subnet=identity.subnet,
            allow=self._allow,
            neighbours=self._neighbours,
        )
        await _nft(rules)
        ruleset = json.loads(await host_ruleset())
        exceptions = forward_exceptions(ruleset, prefix=identity.prefix, table=identity.table)
        if exceptions:
            log.warning("another firewall drops forwarded traffic; added a rule for sandboxes")
            await _nft(exceptions)

    async def _follow_neighbours(self) -> None:
        """Update the rules when the host joins or leaves networks."""
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                found = await _host_neighbours()
                if found != self._neighbours:
                    await _nft(new_neighbours(table=self._identity.table, neighbours=found))
                    self._neighbours = found
            except Exception:  # the rules must be updated in any case
                log.exception("cannot update the firewall for the host's networks; retrying")

    async def _sweep(self) -> None:
        """Remove processes, namespaces and links that an earlier run left behind."""
        kept = {self._identity.uid_first + number for number in self._used}
        for uid in uids_at_work(self._identity.uids):
            if uid not in kept:
                number = uid - self._identity.uid_first
                await self._swept(number, kill_all_of(uid, self._netns(number)))
        egress = self._identity.egress_uids
        for uid in uids_at_work(egress):
            if uid - egress.start not in self._used:
                number = uid - egress.start
                ending = kill_all_of(uid, self._netns(number), is_hidden=True)
                await self._swept(number, ending)
        prefix = self._identity.prefix
        for path in path_of(prefix).parent.glob(f"{prefix}-*"):
            number = int(path.name.removeprefix(f"{prefix}-"))
            if number not in self._used:
                await self._swept(number, self._remove(self.place(number)))
        async with netlink() as host:
            used = {self._host_link(number) for number in self._used}
            for name in await host.link_names():
                if name.startswith(f"{prefix}-") and name not in used:
                    await host.delete_link(name)

    def _netns(self, number: int) -> Path:
        return path_of(f"{self._identity.prefix}-{number}")

    async def _swept(self, number: int, work: Coroutine[object, object, object]) -> None:
        """Remove what is left of one slot. If that fails, its number is not used, and the others
        are still swept."""
        try:
            await work
        except (SandyardError, OSError):
            log.exception("cannot remove the rest of the network slot %d", number)
            self._used.add(number)

    def _refill_in_background(self) -> None:
        if self._crew is not None:
            # If it cannot be made ahead, it is made when it is needed.
            self._crew.start(self._refill(), "a network slot could not be made ahead")

    async def _refill(self) -> None:
        async with self._lock:
            while len(self._spare) < _SPARE and len(self._used) + len(self._spare) < SLOTS:
                self._spare.append(await self._make())

    async def _make(self) -> Place:
        taken = self._used | {place.number for place in self._spare}
        number = next((one for one in range(SLOTS) if one not in taken), None)
        if number is None:
            raise NoCapacityError(
                f"cannot place more machines on this node: all {SLOTS} slots are in use"
            )
        place = self.place(number)
        try:
            await self._build(place)
        except BaseException:
            with contextlib.suppress(InternalError):
                await self._remove(place)
            raise
        return place

    async def _guard(self, place: Place) -> None:
        """Add the rules at the tap to a slot created by an earlier version."""
        try:
            guard = guard_rules(
                tap=_TAP, uplink=_UPLINK, mac=place.mac, egress_uid=self._egress_uid(place)
            )
            rules = guard + input_rules(tap=_TAP)
            await _nft_in(place, rules)
        except InternalError as error:
            log.warning("cannot add the filter to a machine's tap: %s", error.message)

    async def _build(self, place: Place) -> None:
        outer = self._outer(place.number)
        gateway = outer - 1
        link = self._host_link(place.number)
        await run(["ip", "netns", "add", place.netns], limit_s=_TOOL_LIMIT_S)
        await in_thread(
            in_namespace,
            place.netns,
            lambda: asyncio.run(_set_up_kernel(place)),
        )
        rules = slot_rules(
            uplink=_UPLINK,
            tap=_TAP,
            mac=place.mac,
            outer=outer,
            agent_port=AGENT_PORT,
            egress_uid=self._egress_uid(place),
            allow=self._allow,
        )
        # The rules are in place before the first link is up, so no packet passes without them.
        await _nft_in(place, rules)
        address = ipaddress.IPv4Interface(f"{gateway}/30")
        await in_thread(lambda: asyncio.run(_add_host_link(link, place.netns, address)))
        await in_thread(
            in_namespace,
            place.netns,
            lambda: asyncio.run(_set_up_links(place, outer, gateway)),
        )

    async def _remove(self, place: Place) -> None:
        await in_thread(lambda: asyncio.run(_delete_host_link(self._host_link(place.number))))
        if path_of(place.netns).exists():
            await run(["ip", "netns", "del", place.netns], limit_s=_TOOL_LIMIT_S)

    async def _stop_dns(self, place: Place) -> None:
        dns = self._dns.pop(place.number, None)
        if dns is not None:
            dns.cancel()
            await asyncio.wait([dns])

    def _start_dns(self, place: Place) -> None:
        if self._crew is not None:
            serving = self._crew.start(
                forward_dns(place.netns, self._resolvers), "DNS is not served in a slot"
            )
            if serving is not None:
                self._dns[place.number] = serving


async def remove_host_rules(identity: Identity) -> None:
    """Remove an installation's additions to the host's rules, when it is removed."""
    ruleset = json.loads(await host_ruleset())
    removals = exceptions_to_remove(ruleset, table=identity.table)
    if removals:
        await _nft(removals)
    await _nft(f"table inet {identity.table} {{}}\ndelete table inet {identity.table}\n")


# For a thread: the kernel has added or deleted a link before the message is sent, and
# takes ten milliseconds for that, or much longer while others wait for their turn at it.


async def _add_host_link(name: str, netns: str, address: ipaddress.IPv4Interface) -> None:
    async with netlink() as host:
        await host.add_veth(name, peer=_UPLINK, peer_netns=netns)
        await host.bring_up(name, address=address)


async def _delete_host_link(name: str) -> None:
    async with netlink() as host:
        await host.delete_link(name)


async def host_routes() -> list[ipaddress.IPv4Network]:
    """Return the networks that the host has routes to."""
    async with netlink() as host:
        return await host.routes()


async def _host_neighbours() -> tuple[str, ...]:
    """Return the networks that the host is connected to, sorted."""
    async with netlink() as host:
        return tuple(sorted(str(one) for one in await host.neighbours()))


async def _nft(rules: str) -> None:
    await run(["nft", "-f", "-"], limit_s=_TOOL_LIMIT_S, stdin=rules.encode())


async def _nft_in(place: Place, rules: str) -> None:
    command = ["nsenter", f"--net={path_of(place.netns)}", "nft", "-f", "-"]
    await run(command, limit_s=_TOOL_LIMIT_S, stdin=rules.encode())


async def host_ruleset() -> str:
    """Return all nftables rules of the host, as JSON."""
    process = await asyncio.create_subprocess_exec(
        "nft", "-j", "list", "ruleset", stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(_TOOL_LIMIT_S):
        output, _ = await process.communicate()
    return output.decode() or "{}"


async def _set_up_links(
    place: Place,
    outer: ipaddress.IPv4Address,
    gateway: ipaddress.IPv4Address,
) -> None:
    """Create the slot's links; call it in a thread inside the slot's namespace."""
    async with netlink() as slot:
        await slot.bring_up("lo")
        await slot.bring_up(_UPLINK, address=ipaddress.IPv4Interface(f"{outer}/30"))
        await slot.add_default_route(gateway)
        # The same in every slot: a restored guest still knows the gateway by it.
        gateway_address = ipaddress.IPv4Interface(f"{GATEWAY_IP}/30")
        await slot.bring_up(_TAP, address=gateway_address, mac=_GATEWAY_MAC)
        await slot.add_neighbour(_TAP, ip=GUEST_IP, mac=place.mac)


async def _set_up_kernel(place: Place) -> None:
    """Set per-namespace kernel parameters, and add the tap, which is down; call it in a thread
    inside the slot's namespace."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for name in ("all", "default"):
        off = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        if off.exists():
            off.write_text("1")
    async with netlink() as slot:
        await slot.add_tap(_TAP, uid=place.uid)
