"""Everything that faces and gateways call."""

from dataclasses import dataclass

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.builds.build import TemplateServices
from sandyard.server.service.builds.building import Building
from sandyard.server.service.builds.builds import Builds
from sandyard.server.service.builds.credentials import RegistryCredentials
from sandyard.server.service.builds.uploads import Uploads
from sandyard.server.service.feed import Feed
from sandyard.server.service.money.billing import Billing
from sandyard.server.service.money.build import Money
from sandyard.server.service.network.build import NetworkServices
from sandyard.server.service.network.journals import Journals
from sandyard.server.service.network.secrets import Secrets
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.build import People
from sandyard.server.service.people.credentials import Credentials
from sandyard.server.service.people.logins import Logins
from sandyard.server.service.people.organizations import Organizations
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.people.ssh_keys import SshKeys
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.sandboxes.build import SandboxServices
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.contexts import Contexts
from sandyard.server.service.sandboxes.create import Creation
from sandyard.server.service.sandboxes.desktops import Desktops
from sandyard.server.service.sandboxes.execute import Commands
from sandyard.server.service.sandboxes.files import Files
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.previews import Previews
from sandyard.server.service.sandboxes.processes import Processes
from sandyard.server.service.sandboxes.signing import Signing
from sandyard.server.service.sandboxes.snapshots import Snapshots
from sandyard.server.service.sandboxes.terminals import Terminals
from sandyard.server.service.sandboxes.tokens import SandboxTokens
from sandyard.server.service.templates.templates import Templates
from sandyard.server.service.workspaces.build import WorkspaceServices
from sandyard.server.service.workspaces.files import WorkspaceFiles
from sandyard.server.service.workspaces.workspaces import Workspaces


@dataclass(frozen=True)
class Services:
    """The services of a control plane."""

    access: Access
    credentials: Credentials
    rates: Rates
    organizations: Organizations
    api_keys: ApiKeys
    ssh_keys: SshKeys
    feed: Feed
    billing: Billing
    clock: Clock
    creation: Creation
    sandboxes: Sandboxes
    secrets: Secrets
    journals: Journals
    commands: Commands
    processes: Processes
    contexts: Contexts
    files: Files
    signing: Signing
    tokens: SandboxTokens
    addresses: Addresses
    logins: Logins
    previews: Previews
    forwards: Forwards
    terminals: Terminals
    desktops: Desktops
    snapshots: Snapshots
    templates: Templates
    builds: Builds
    uploads: Uploads
    registry_credentials: RegistryCredentials
    building: Building
    workspaces: Workspaces
    workspace_files: WorkspaceFiles
    readiness: Readiness


def gather(
    platform: Platform,
    *,
    people: People,
    money: Money,
    sandboxes: SandboxServices,
    network: NetworkServices,
    workspaces: WorkspaceServices,
    templates: TemplateServices,
    addresses: Addresses,
) -> Services:
    """Return the services of all folders as faces see them."""
    return Services(
        access=people.access,
        credentials=Credentials(
            access=people.access, tickets=sandboxes.tickets, signing=sandboxes.signing
        ),
        rates=people.rates,
        organizations=people.organizations,
        api_keys=people.api_keys,
        ssh_keys=people.ssh_keys,
        feed=Feed(platform.store, platform.register, platform.opened),
        billing=money.billing,
        clock=platform.clock,
        creation=sandboxes.creation,
        sandboxes=sandboxes.sandboxes,
        secrets=network.secrets,
        journals=network.journals,
        commands=sandboxes.commands,
        processes=sandboxes.processes,
        contexts=sandboxes.contexts,
        files=sandboxes.files,
        signing=sandboxes.signing,
        tokens=sandboxes.tokens,
        addresses=addresses,
        logins=people.logins,
        previews=sandboxes.previews,
        forwards=sandboxes.forwards,
        terminals=sandboxes.terminals,
        desktops=sandboxes.desktops,
        snapshots=sandboxes.snapshots,
        templates=platform.templates,
        builds=templates.builds,
        uploads=templates.uploads,
        registry_credentials=templates.credentials,
        building=templates.building,
        workspaces=workspaces.workspaces,
        workspace_files=workspaces.files,
        readiness=Readiness(platform.store, platform.nodes, platform.clock),
    )
