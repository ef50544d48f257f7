"""`sandyard admin …`: for the operator, on the host, whether or not a server runs."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sandyard.cli.output import plain, show_table
from sandyard.cli.server import server_module, server_settings

app = typer.Typer(
    help="Organizations, users, keys and credits; works when the server is down.",
    no_args_is_help=True,
)
org = typer.Typer(help="Make organizations and say what they may have.", no_args_is_help=True)
user = typer.Typer(help="Who belongs to an organization.", no_args_is_help=True)
key = typer.Typer(help="API keys of any member.", no_args_is_help=True)
app.add_typer(org, name="org")
app.add_typer(user, name="user")
app.add_typer(key, name="key")
quarantine = typer.Typer(
    help="Machines and snapshots that a database restored from a backup does not know.",
    no_args_is_help=True,
)
app.add_typer(quarantine, name="quarantine")
authority = typer.Typer(
    no_args_is_help=True, help="Replace the certificate authority of several hosts."
)
app.add_typer(authority, name="authority")
# What is read by a program is not cut off at a terminal's width.
out = Console(
    width=None if sys.stdout and sys.stdout.isatty() else 250, highlight=False, markup=False
)

node = typer.Typer(
    help="The nodes of an installation on several hosts; on a control plane's host.",
    no_args_is_help=True,
)
app.add_typer(node, name="node")

Org = Annotated[str, typer.Argument(help="The organization's id or slug.", metavar="ORG")]
Who = Annotated[str, typer.Argument(help="The user's e-mail address or id.", metavar="USER")]


def _do(work: Callable[[Any], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with server_module("admin").administration(server_settings()) as opened:
            return await work(opened)

    return asyncio.run(run())


def _money(cents: int) -> str:
    shown: str = server_module("admin").show(cents)
    return shown


@app.command("orgs", hidden=True)
@org.command("list")
def list_orgs() -> None:
    """List organizations, their balance and running sandboxes."""
    columns = ("slug", "name", "plan", "balance", "members", "running", "id")
    rows = [
        (
            one.organization.slug, one.organization.name, one.organization.plan,
            _money(one.account.balance_cents), str(one.members), str(one.in_use.active),
            one.organization.id,
        )
        for one in _do(lambda admin: admin.organizations())
    ]  # fmt: skip
    show_table(columns, rows)


@app.command()
def grant(
    organization: Org,
    cents: Annotated[int, typer.Argument(help="The amount. Negative values take credits away.")],
    description: Annotated[
        str, typer.Option(help="The ledger's description.")
    ] = "Operator's grant",
    reference: Annotated[
        str | None,
        typer.Option(help="A reference. A grant with the same reference is made only once."),
    ] = None,
) -> None:
    """Grant credits to an organization."""
    entry, is_new = _do(
        lambda admin: admin.grant(
            organization, cents, description=description, reference_id=reference
        )
    )
    outcome = "granted" if cents > 0 else "taken away"
    outcome = outcome if is_new else f"done before: {outcome}"
    out.print(f"{outcome} {_money(abs(cents))}; balance {_money(entry.balance_after_cents)}")


@app.command()
def ledger(
    organization: Org, limit: Annotated[int, typer.Option(help="How many entries.")] = 50
) -> None:
    """Show the newest entries of an organization's ledger."""
    columns = ("when", "type", "amount", "balance", "what")
    rows = [
        (
            f"{entry.created_at:%Y-%m-%d %H:%M}", entry.type, _money(entry.amount_cents),
            _money(entry.balance_after_cents), entry.description,
        )
        for entry in _do(lambda admin: admin.ledger(organization, limit=limit))
    ]  # fmt: skip
    show_table(columns, rows)


@org.command("create")
def create_org(
    name: Annotated[str, typer.Argument(help="The name.")],
    admin_email: Annotated[str, typer.Argument(help="The first admin's e-mail address.")],
) -> None:
    """Create an organization. Next, create a key for its admin."""
    made, admin = _do(lambda opened: opened.create_organization(name, admin_email))
    out.print(f"{made.id} {made.slug}")
    out.print(f"next: sandyard admin key create {made.slug} {admin.email} first-key")


@org.command("plan")
def set_plan(
    organization: Org, plan: Annotated[str, typer.Argument(help="A plan from the setting `plans`.")]
) -> None:
    """Change an organization's plan."""
    made = _do(lambda admin: admin.set_plan(organization, plan))
    out.print(f"{made.slug} is on the plan {made.plan}")


@org.command("limit")
def set_limit(
    organization: Org,
    name: Annotated[
        str,
        typer.Argument(
            help="requestsPerMinute, sandboxes, vcpus, memoryGb, diskGb, storageGb, testSandboxes, "
            "snapshots, snapshotGb or testSnapshots."
        ),
    ],
    value: Annotated[str, typer.Argument(help="A number, or `plan` for the plan's limit.")],
) -> None:
    """Override a limit of an organization's plan."""
    if value != "plan" and not value.isdigit():
        raise typer.BadParameter("the limit is a whole number, or `plan`")
    wanted = None if value == "plan" else int(value)
    made = _do(lambda admin: admin.set_limit(organization, name, wanted))
    out.print(f"limits of {made.slug}: {dict(made.limits) or 'as its plan says'}")


@user.command("list")
def list_users(organization: Org) -> None:
    """List an organization's members."""
    columns, rows = ("id", "email", "role", "operator"), []
    for one, member in _do(lambda admin: admin.members(organization)):
        rows.append((one.id, one.email, member.role, "yes" if one.is_operator else ""))
    show_table(columns, rows)


@user.command("add")
def add_user(
    organization: Org,
    email: Annotated[str, typer.Argument(help="The e-mail address.")],
    role: Annotated[str, typer.Option(help="admin or member.")] = "member",
) -> None:
    """Add a member to an organization."""
    made = _do(lambda admin: admin.add_member(organization, email, role))
    out.print(f"{made.id} {made.email}")


@user.command("role")
def change_role(
    organization: Org, who: Who, role: Annotated[str, typer.Argument(help="admin or member.")]
) -> None:
    """Change a member's role, effective at once."""
    _do(lambda admin: admin.change_role(organization, who, role))
    out.print(f"{who} is {role}")


@user.command("remove", hidden=True)
@user.command("delete")
def delete_user(organization: Org, who: Who) -> None:
    """Remove a member and revoke their keys. Their sandboxes stay."""
    _do(lambda admin: admin.remove_member(organization, who))
    out.print(f"{who} is no member any more")


@user.command("operator")
def set_operator(
    who: Who,
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke this right.")] = False,
) -> None:
    """Allow a user to grant credits over the API."""
    made = _do(lambda admin: admin.set_operator(who, is_operator=not revoke))
    out.print(f"{made.email} is {'an' if made.is_operator else 'no'} operator")


@key.command("list")
def list_keys(organization: Org) -> None:
    """List an organization's API keys."""
    columns = ("id", "name", "prefix", "owner", "scopes", "expires", "last used")
    rows = [
        (
            one.id, one.name, one.prefix, one.owner_email, " ".join(one.scopes),
            f"{one.expires_at:%Y-%m-%d}" if one.expires_at else "never",
            f"{one.last_used_at:%Y-%m-%d %H:%M}" if one.last_used_at else "",
        )
        for one in _do(lambda admin: admin.keys(organization))
    ]  # fmt: skip
    show_table(columns, rows)


@key.command("create")
def create_key(
    organization: Org,
    who: Who,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="A scope. May be repeated. Default: all.")
    ] = None,
    expires_in: Annotated[str | None, typer.Option(help="30d, 12m, 1y or never.")] = None,
    test: Annotated[
        bool,
        typer.Option("--test", help="A test key: its sandboxes are free, and few are allowed."),
    ] = False,
) -> None:
    """Create an API key for a member. The secret is printed once."""
    _, secret = _do(
        lambda admin: admin.create_key(
            organization, who, name, scopes=scope or [], expires_in=expires_in, is_test=test
        )
    )
    typer.echo(secret)


@key.command("revoke")
def revoke_key(
    organization: Org, key_id: Annotated[str, typer.Argument(help="The key's id.")]
) -> None:
    """Revoke an API key permanently."""
    made = _do(lambda admin: admin.revoke_key(organization, key_id))
    out.print(f"{made.name} is revoked")


# --- several hosts ------------------------------------------------------------------------------

Node = Annotated[str, typer.Argument(help="The node's name or id.", metavar="NODE")]


def _with_fleet(work: Callable[[Any], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with server_module("cluster").open_fleet(server_settings()) as (fleet, _):
            return await work(fleet)

    return asyncio.run(run())


@node.command()
def invite() -> None:
    """Print the command that makes another host a node. It is valid once, for an hour."""
    typer.echo(asyncio.run(server_module("cluster").invite_line(server_settings())))


@node.command("list")
def list_nodes() -> None:
    """List nodes and their state."""
    columns = (
        "name", "status", "new sandboxes", "running", "other", "snapshots", "address", "version",
        "joined", "id",
    )  # fmt: skip

    async def found(fleet: Any) -> list[tuple[Any, Any]]:
        return [(one, await fleet.holdings(one.id)) for one in await fleet.nodes()]

    rows = []
    for one, holdings in _with_fleet(found):
        running = holdings.sandboxes.get("running", 0)
        rows.append(
            (
                one.name, _status_of(one), "no, draining" if one.is_draining else "yes",
                str(running), str(sum(holdings.sandboxes.values()) - running),
                str(holdings.snapshots), f"{one.host}:{one.port}" if one.host else "", one.version,
                f"{one.joined_at:%Y-%m-%d %H:%M}", one.id,
            )
        )  # fmt: skip
    show_table(columns, rows)


def _status_of(node: Any) -> str:
    if not node.epoch:
        return "never started"
    return "up" if node.has_lease else "lost" if node.lost_at else "away"


@node.command("show")
def show_node(node: Node) -> None:
    """Show a node: what is on it, what it can still take, and how it is reached."""
    seen = asyncio.run(server_module("overview").look_at_node(server_settings(), node))
    one, report = seen.node, seen.report
    status = _status_of(one)
    if one.lost_at:
        status += f" since {one.lost_at:%Y-%m-%d %H:%M:%S} UTC"
    rows = [
        ("name", one.name), ("id", one.id), ("status", status), ("version", one.version),
        ("new sandboxes", "no, draining" if one.is_draining else "yes"),
        ("address", f"{one.host}:{one.port}" if one.host else ""),
        ("joined", f"{one.joined_at:%Y-%m-%d %H:%M} UTC, started {one.epoch} times"),
    ]  # fmt: skip
    if one.lease_until is not None and not one.has_lease:
        rows.append(("lease ended", f"{one.lease_until:%Y-%m-%d %H:%M:%S} UTC"))
    counts = ", ".join(f"{count} {status}" for status, count in seen.holdings.sandboxes.items())
    rows += [("sandboxes", counts or "none"), ("snapshots", str(seen.holdings.snapshots))]
    if report is not None:
        waiting = sum(shelf.size for shelf in report.shelves)
        drivers = {one.driver for one in report.machines if one.driver}
        rows += [
            ("can still take", f"{report.memory_mib} MiB of memory, {report.disk_mib} MiB of disk"),
            ("templates", ", ".join(report.templates) or "none"),
            ("machines", f"{len(report.machines)}, and {waiting} that wait in the pool"),
            ("drivers", ", ".join(sorted(drivers)) or "no machine is running"),
        ]
        for name, texts in (("cannot", report.missing), ("limited", report.limited)):
            rows += [(name, text) for text in texts]
    rows.append(("over NATS", "reached" if report is not None else f"no: {seen.silence}"))
    rows.append(
        ("directly", "reached" if not seen.tunnel_trouble else f"no: {seen.tunnel_trouble}")
    )
    if seen.is_cut_from_nats_alone:
        rows.append(("note", "cut off from NATS only: it keeps its lease directly; sandboxes run"))
    kept = sum(seen.holdings.sandboxes.values())
    if one.has_lease:
        forget = "no: it is up; drain and stop it first"
    elif kept or seen.holdings.snapshots:
        forget = f"no: {kept} sandboxes and {seen.holdings.snapshots} snapshots are on it"
    else:
        forget = "yes"
    rows.append(("can be forgotten", forget))
    show_table(("what", "value"), rows)


@node.command()
def drain(node: Node) -> None:
    """Place no new sandboxes on a node. Existing ones stay."""
    made = _with_fleet(lambda fleet: fleet.drain(node, is_draining=True))
    out.print(f"nothing new comes to {made.name}")


@node.command()
def undrain(node: Node) -> None:
    """Place sandboxes on a node again."""
    made = _with_fleet(lambda fleet: fleet.drain(node, is_draining=False))
    out.print(f"{made.name} takes new sandboxes")


@node.command("confirm-off")
def confirm_off(
    node: Node,
    sure: Annotated[
        bool,
        typer.Option(
            "--yes",
            prompt="What ran there is in error from now on. Is the host off?",
            help="Do not ask for confirmation.",
        ),
    ],
) -> None:
    """Confirm that a lost node's host is switched off: its sandboxes are given up, and pending
    deletes complete."""
    if not sure:
        raise typer.Abort
    made, ended = _with_fleet(lambda fleet: fleet.confirm_off(node))
    out.print(f"{made.name} is off; {ended} sandboxes ended with it")


@node.command()
def forget(node: Node) -> None:
    """Remove a node that is gone and has no sandboxes."""
    made = _with_fleet(lambda fleet: fleet.forget(node))
    out.print(f"{made.name} is no node any more")


@app.command()
def migrate(
    sure: Annotated[
        bool, typer.Option("--yes", help="Also if older servers cannot use it after that.")
    ] = False,
) -> None:
    """Migrate the database to the schema of this version.

    With several hosts, servers of the version before continue meanwhile; if they cannot, this says
    so and changes nothing. On a single machine the server does this itself when it starts."""
    database = server_module("database")
    before, after = asyncio.run(database.migrate(server_settings(), is_sure=sure))
    if before.present == after.present:
        typer.echo(f"the database needs no migration: its schema is {after.present}")
    else:
        was = before.present or "nothing"
        typer.echo(f"migrated the database from {was} to {after.present}")


@app.command("confirm-clock")
def confirm_clock() -> None:
    """Confirm that the clock was set on purpose: servers follow it now instead of after five
    minutes."""

    async def confirm() -> Any:
        settings = server_settings()
        async with server_module("database").open_database(settings) as store:
            return await server_module("clocks").confirm(store)

    now = asyncio.run(confirm())
    typer.echo(f"the servers follow the clock within some seconds: {now:%Y-%m-%d %H:%M:%S} UTC")


@app.command("nats-config")
def nats_config(
    folder: Annotated[
        Path, typer.Argument(help="The directory for the configuration and its certificate.")
    ],
    host: Annotated[str, typer.Option(help="The address that the server listens on.")] = "0.0.0.0",  # noqa: S104
    address: Annotated[
        list[str] | None,
        typer.Option(help="An address by which others reach it, if different. May be repeated."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 4222,
    name: Annotated[str, typer.Option(help="Its name among the servers.")] = "nats",
    cluster_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="With several servers: the port for connections between them."
        ),
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option(
            help="With several servers: another server's tls://HOST:CLUSTER_PORT. May be repeated."
        ),
    ] = None,
) -> None:
    """Write the configuration of a NATS server for the installation, to start nats-server with."""
    written = asyncio.run(
        server_module("cluster").write_nats_config(
            server_settings(),
            folder,
            host=host,
            addresses=tuple(address or ()),
            port=port,
            routes=tuple(route or ()),
            cluster_port=cluster_port,
            name=name,
        )
    )
    typer.echo(f"nats-server -c {written}")


def _show_authorities(work: Callable[[Any, Any], Coroutine[Any, Any, Any]]) -> None:
    found: Any = asyncio.run(work(server_module("authorities"), server_settings()))
    rows = [
        (one.whose, one.state, f"{one.expires_at:%Y-%m-%d}", one.fingerprint[:16])
        for one in found.trusted
    ]
    show_table(("authority of", "state", "expires", "fingerprint"), rows)
    out.print(f"next: {found.next_step}")


Sure = Annotated[bool, typer.Option("--yes", help="Also if a host did not take the last step.")]


@authority.command("show")
def show_authority() -> None:
    """Show the certificate authorities that hosts trust."""
    _show_authorities(lambda own, settings: own.authorities(settings))


@authority.command("add")
def add_authority() -> None:
    """Have all hosts trust a new authority beside the one in use: the first of three steps."""
    _show_authorities(lambda own, settings: own.add_authority(settings))


@authority.command("use")
def use_authority(yes: Sure = False) -> None:
    """Have all hosts get certificates of the new authority: the second step."""
    _show_authorities(lambda own, settings: own.use_authority(settings, is_sure=yes))


@authority.command("remove", hidden=True)
@authority.command("delete")
def delete_authority(yes: Sure = False) -> None:
    """Have hosts trust the authority in use alone: the third step."""
    _show_authorities(lambda own, settings: own.remove_authority(settings, is_sure=yes))


@quarantine.command("list")
def list_quarantine() -> None:
    """List the machines and snapshots in quarantine. They are kept, and not billed."""
    columns = ("id", "kind", "node", "found", "phase", "template", "shape")
    rows = [
        (
            one.id, one.kind, one.node_id, f"{one.found_at:%Y-%m-%d %H:%M}",
            "being deleted" if one.is_unwanted else one.phase, one.template,
            f"{one.shape.vcpus} vcpu, {one.shape.memory_mib} MB, {one.shape.disk_mib} MB",
        )
        for one in _do(lambda admin: admin.quarantine())
    ]  # fmt: skip
    show_table(columns, rows)


@quarantine.command("adopt")
def adopt(
    wanted: Annotated[str, typer.Argument(help="The id in the list.", metavar="ID")],
    organization: Org,
    who: Who,
) -> None:
    """Make a machine a sandbox again, paused, which belongs to this user; or a snapshot one."""
    made = _do(lambda admin: admin.adopt(wanted, organization, who))
    out.print(f"{made.id} belongs to {who}")
    reason = getattr(made, "reason", None)
    if reason is not None:
        out.print(plain(reason.message))


@quarantine.command("delete")
def delete_quarantined(
    wanted: Annotated[str, typer.Argument(help="The id in the list.", metavar="ID")],
) -> None:
    """Delete a machine or snapshot with its files; the server does so within five minutes."""
    _do(lambda admin: admin.condemn(wanted))
    out.print(f"{wanted} will be deleted")
