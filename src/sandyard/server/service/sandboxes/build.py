"""Builds the services about sandboxes."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sandyard.server.service.addresses import Addresses
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.contexts import Contexts
from sandyard.server.service.sandboxes.create import Creation, KeyRing
from sandyard.server.service.sandboxes.desktops import Desktops
from sandyard.server.service.sandboxes.enforcing import Enforcing
from sandyard.server.service.sandboxes.execute import Commands
from sandyard.server.service.sandboxes.files import Files
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.power import Power, Waits
from sandyard.server.service.sandboxes.previews import Previews
from sandyard.server.service.sandboxes.processes import Processes
from sandyard.server.service.sandboxes.reach import Reach
from sandyard.server.service.sandboxes.signing import Signing
from sandyard.server.service.sandboxes.snapshots import Snapshots
from sandyard.server.service.sandboxes.terminals import Terminals
from sandyard.server.service.sandboxes.tickets import Tickets
from sandyard.server.service.sandboxes.tokens import SandboxTokens
from sandyard.server.service.sandboxes.worker import Worker
from sandyard.server.service.signers import Signers


@dataclass(frozen=True)
class SandboxServices:
    """The services."""

    creation: Creation
    sandboxes: Sandboxes
    snapshots: Snapshots
    commands: Commands
    processes: Processes
    contexts: Contexts
    files: Files
    forwards: Forwards
    tickets: Tickets
    tokens: SandboxTokens
    signing: Signing
    previews: Previews
    terminals: Terminals
    desktops: Desktops


def build_sandboxes(
    platform: Platform,
    *,
    worker: Worker,
    ssh_keys: KeyRing,
    addresses: Addresses,
    preview_s: int,
    hash_password: Callable[[str], Awaitable[str]],
) -> SandboxServices:
    """Return the services. `worker` does the work on a sandbox that a request waits for."""
    clock, register, opened, waits = (
        platform.clock,
        platform.register,
        platform.opened,
        Waits(),
    )
    signers = Signers(platform.store, clock)
    tickets = Tickets(platform, signers, preview_s=preview_s)
    power = Power(platform, worker=worker, waits=waits)
    reach = Reach(platform, power=power)
    processes = Processes(reach, clock, opened, platform.repeats)
    commands = Commands(reach, clock)
    return SandboxServices(
        creation=Creation(
            platform,
            worker=worker,
            power=power,
            ssh_keys=ssh_keys,
            hash_password=hash_password,
            pooled_wait_s=waits.pooled_s,
        ),
        sandboxes=Sandboxes(
            platform, worker=worker, power=power, waits=waits, enforcing=Enforcing(platform)
        ),
        snapshots=Snapshots(platform, worker=worker, power=power),
        commands=commands,
        processes=processes,
        contexts=Contexts(processes, clock, platform.repeats),
        files=Files(reach, clock, opened),
        forwards=Forwards(reach, clock),
        tickets=tickets,
        tokens=SandboxTokens(platform, signers),
        signing=Signing(platform, signers),
        previews=Previews(platform, reach=reach, tickets=tickets, addresses=addresses),
        terminals=Terminals(register, processes, tickets),
        desktops=Desktops(
            platform, reach=reach, commands=commands, tickets=tickets, addresses=addresses
        ),
    )
