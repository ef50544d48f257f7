"""`sandyard admin …`: for the operator, on the host, whether or not a server runs."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sandyard.cli.output import show_table
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


@app.command("orgs")
def list_orgs() -> None:
    """List organizations with balance and what runs."""
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
    cents: Annotated[int, typer.Argument(help="How many; below 0 takes some away.")],
    description: Annotated[str, typer.Option(help="What the ledger says.")] = "Operator's grant",
    reference: Annotated[
        str | None, typer.Option(help="With one, the grant is made once, however often asked.")
    ] = None,
) -> None:
    """Give an organization credits."""
    entry, is_new = _do(
        lambda admin: admin.grant(
            organization, cents, description=description, reference_id=reference
        )
    )
    said = "granted" if cents > 0 else "taken away"
    said = said if is_new else f"done before: {said}"
    out.print(f"{said} {_money(abs(cents))}; balance {_money(entry.balance_after_cents)}")


@app.command()
def ledger(
    organization: Org, limit: Annotated[int, typer.Option(help="How many lines.")] = 50
) -> None:
    """Show the newest lines of an organization's ledger."""
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
    name: Annotated[str, typer.Argument(help="What people call it.")],
    admin_email: Annotated[str, typer.Argument(help="Its first admin's e-mail address.")],
) -> None:
    """Make an organization; make a key for its admin next."""
    made, admin = _do(lambda opened: opened.create_organization(name, admin_email))
    out.print(f"{made.id} {made.slug}")
    out.print(f"next: sandyard admin key create {made.slug} {admin.email} first-key")


@org.command("plan")
def set_plan(
    organization: Org, plan: Annotated[str, typer.Argument(help="One of the setting plans.")]
) -> None:
    """Put an organization on another plan."""
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
    value: Annotated[str, typer.Argument(help="A number; `plan` for what its plan says.")],
) -> None:
    """Give an organization a limit of its own."""
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
    """Make somebody a member."""
    made = _do(lambda admin: admin.add_member(organization, email, role))
    out.print(f"{made.id} {made.email}")


@user.command("role")
def change_role(
    organization: Org, who: Who, role: Annotated[str, typer.Argument(help="admin or member.")]
) -> None:
    """Change what a member may do; in force at once."""
    _do(lambda admin: admin.change_role(organization, who, role))
    out.print(f"{who} is {role}")


@user.command("remove")
def remove_user(organization: Org, who: Who) -> None:
    """End a membership and revoke the member's keys; their sandboxes stay."""
    _do(lambda admin: admin.remove_member(organization, who))
    out.print(f"{who} is no member any more")


@user.command("operator")
def set_operator(
    who: Who,
    revoke: Annotated[bool, typer.Option("--revoke", help="No longer.")] = False,
) -> None:
    """Let a user grant credits over the API."""
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
    scope: Annotated[list[str] | None, typer.Option(help="May be repeated; default: all.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="30d, 12m, 1y or never.")] = None,
    test: Annotated[bool, typer.Option("--test", help="What it makes is free and few.")] = False,
) -> None:
    """Make an API key for a member; the secret is printed once."""
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
    """Make an API key no good, at once and for ever."""
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
    """Print the line that makes another host a node: good once, for an hour."""
    typer.echo(asyncio.run(server_module("cluster").invite_line(server_settings())))


@node.command("list")
def list_nodes() -> None:
    """List nodes, and whether each is there."""
    columns = ("name", "status", "new sandboxes", "epoch", "address", "version", "joined", "id")
    rows = []
    for one in _with_fleet(lambda fleet: fleet.nodes()):
        status = "up" if one.has_lease else "lost" if one.lost_at else "away"
        rows.append(
            (
                one.name, status if one.epoch else "never started",
                "no, draining" if one.is_draining else "yes", str(one.epoch),
                f"{one.host}:{one.port}" if one.host else "", one.version,
                f"{one.joined_at:%Y-%m-%d %H:%M}", one.id,
            )
        )  # fmt: skip
    show_table(columns, rows)


@node.command()
def drain(node: Node) -> None:
    """Place nothing new on a node; what is there stays."""
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
            help="Do not ask whether it is.",
        ),
    ],
) -> None:
    """Say of a lost node that its host is off: what ran there is given up, deletes are done."""
    if not sure:
        raise typer.Abort
    made, ended = _with_fleet(lambda fleet: fleet.confirm_off(node))
    out.print(f"{made.name} is off; {ended} sandboxes ended with it")


@node.command()
def forget(node: Node) -> None:
    """Remove a node that is not there any more, and has nothing."""
    made = _with_fleet(lambda fleet: fleet.forget(node))
    out.print(f"{made.name} is no node any more")


@app.command("nats-config")
def nats_config(
    folder: Annotated[Path, typer.Argument(help="Where it is written, with a certificate.")],
    host: Annotated[str, typer.Option(help="The address that the server listens on.")] = "0.0.0.0",  # noqa: S104
    address: Annotated[
        list[str] | None,
        typer.Option(help="What the others reach it by, if not by that; may be repeated."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 4222,
    name: Annotated[str, typer.Option(help="Its name among the servers.")] = "nats",
    cluster_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Of several servers: the port for each other."),
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option(help="Of several: another's tls://HOST:CLUSTER_PORT; may be repeated."),
    ] = None,
) -> None:
    """Write the configuration of a NATS server of the installation: start nats-server with it."""
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
