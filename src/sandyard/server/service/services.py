"""Everything that faces and gateways call."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sandyard.server.service.addresses import Addresses
from sandyard.server.service.feed import Feed
from sandyard.server.service.money.billing import Billing
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.credentials import Credentials
from sandyard.server.service.people.logins import Logins
from sandyard.server.service.people.organizations import Organizations
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.people.ssh_keys import SshKeys
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.create import Creation
from sandyard.server.service.sandboxes.desktops import Desktops
from sandyard.server.service.sandboxes.execute import Commands
from sandyard.server.service.sandboxes.files import Files
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.previews import Previews
from sandyard.server.service.sandboxes.processes import Processes
from sandyard.server.service.sandboxes.signing import Signing
from sandyard.server.service.sandboxes.snapshots import Snapshots
from sandyard.server.service.sandboxes.terminals import Terminals
from sandyard.server.service.templates import Templates
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
    now: Callable[[], datetime]
    creation: Creation
    sandboxes: Sandboxes
    commands: Commands
    processes: Processes
    files: Files
    signing: Signing
    addresses: Addresses
    logins: Logins
    previews: Previews
    forwards: Forwards
    terminals: Terminals
    desktops: Desktops
    snapshots: Snapshots
    templates: Templates
    workspaces: Workspaces
    workspace_files: WorkspaceFiles
    readiness: Readiness
