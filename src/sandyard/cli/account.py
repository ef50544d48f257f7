"""`sandyard login`, `auth`, `ssh-key`, `usage`: who one is, with which keys, and what it costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sandyard.cli.credentials import secret_of
from sandyard.cli.output import Json, for_each, note_copy, plain, show_json, show_table
from sandyard.cli.sandbox import open_client
from sandyard.client import ApiError, Sandyard
from sandyard.client.config import (
    ClientConfig,
    config_path,
    find_config,
    remove_config,
    write_config,
)

auth = typer.Typer(help="Who you are, and your API keys.", no_args_is_help=True)
keys = typer.Typer(help="API keys: make, list, replace, revoke.", no_args_is_help=True)
ssh_key = typer.Typer(help="The public keys that open sandboxes.", no_args_is_help=True)
auth.add_typer(keys, name="keys")

_KEYS, _SSH_KEYS = "/v1/api-keys", "/v1/ssh-keys"
_PERIODS = ("current", "7d", "30d", "all_time")


def login(
    url: Annotated[
        str | None, typer.Option(help="The server's URL. Default: the configured one.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="The API key. Other users of this machine can see it in the process list."
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the API key, or - for standard input. Default: a prompt, or "
            "standard input if piped."
        ),
    ] = None,
) -> None:
    """Save a server and an API key for this user, after checking them."""
    found = secret_of(key, key_file, what="API key", option="--key-file")
    config = find_config(found, url)
    with Sandyard(config.api_key, config.url) as client:
        email = client.ask("GET", "/v1/me")["data"]["email"]
    note_copy(write_config(ClientConfig(config.url, config.api_key)))
    typer.echo(plain(f"you are {email} at {config.url}; saved in {config_path()}"))


def logout() -> None:
    """Remove the saved server and API key. The key stays valid until it is revoked."""
    remove_config()
    typer.echo(f"removed from {config_path()}")


@auth.command()
def whoami(as_json: Json = False) -> None:
    """Show the current user and organization."""
    with open_client() as client:
        me = client.ask("GET", "/v1/me")["data"]
        org = client.ask("GET", "/v1/organizations/current")["data"]
    if as_json:
        show_json({"user": me, "organization": org})
        return
    row = (me["email"], org["name"], org["slug"], client.config.url)
    show_table(("email", "organization", "slug", "server"), [row])


def _rows(found: list[dict[str, Any]]) -> None:
    show_table(
        ("id", "name", "key", "scopes", "status", "expires", "last used"),
        [
            (
                one["id"], one["name"], f"{one['keyPrefix']}…", " ".join(one["scopes"]),
                one["status"], one["expiresAt"] or "", one["lastUsedAt"] or "",
            )
            for one in found
        ],
    )  # fmt: skip


@keys.command("list")
def list_keys(as_json: Json = False) -> None:
    """List your API keys. Admins see the organization's."""
    with open_client() as client:
        found = _all(client, _KEYS)
    if as_json:
        show_json(found)
    else:
        _rows(found)


def _all(client: Sandyard, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    query: dict[str, str] = {}
    while True:
        page = client.ask("GET", path, query=query)
        found += page["data"]
        if not page["hasMore"]:
            return found
        query = {"cursor": page["nextCursor"]}


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="A scope. May be repeated. Default: all of yours.")
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(help="The lifetime: 30d, 12m, 1y. Default: no expiry.")
    ] = None,
    e2b: Annotated[
        bool, typer.Option("--e2b", help="Of the form that clients of E2B insist on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Create an API key and print it. It is shown only once."""
    body = {"name": name, "scopes": scope, "expiresIn": expires_in}
    if e2b:
        body["format"] = "e2b"
    with open_client() as client:
        made = client.ask("POST", _KEYS, body=body)["data"]
    _show_secret(made, as_json=as_json)


@keys.command("rotate")
def rotate_key(
    key: Annotated[str, typer.Argument(help="Its id.", metavar="ID")], as_json: Json = False
) -> None:
    """Replace an API key's secret. The old secret stops working at once; scopes do not change."""
    with open_client() as client:
        made = client.ask("POST", f"{_KEYS}/{key}/rotate")["data"]
    _show_secret(made, as_json=as_json)


def _show_secret(made: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(made)
        return
    typer.echo(made["key"])
    shown = f"the id of {made['name']} is {made['id']}; keep the key: it is shown only once"
    typer.echo(plain(shown), err=True)


@keys.command("revoke")
def revoke_keys(
    ids: Annotated[list[str], typer.Argument(help="Their ids.", metavar="ID…")],
    as_json: Json = False,
) -> None:
    """Revoke API keys at once."""
    with open_client() as client:

        def revoke(one: str) -> str:
            client.ask("DELETE", f"{_KEYS}/{one}")
            return f"revoked {one}"

        for_each(ids, revoke, as_json=as_json)


@ssh_key.command("add")
def add_ssh_key(
    name: Annotated[str, typer.Argument(help="The name.")],
    file: Annotated[
        Path, typer.Option(help="The public key's file, such as ~/.ssh/id_ed25519.pub.")
    ],
    as_json: Json = False,
) -> None:
    """Add a public key. Sandboxes created from now on accept it."""
    text = file.expanduser().read_text(errors="replace").strip()
    if "PRIVATE KEY" in text:
        raise typer.BadParameter(f"{file} is a private key: give the one that ends in .pub")
    with open_client() as client:
        made = client.ask("POST", _SSH_KEYS, body={"name": name, "publicKey": text})["data"]
    if as_json:
        show_json(made)
    else:
        _show_ssh_keys([made])


@ssh_key.command("list")
def list_ssh_keys(as_json: Json = False) -> None:
    """List the organization's public keys."""
    with open_client() as client:
        found = _all(client, _SSH_KEYS)
    if as_json:
        show_json(found)
    else:
        _show_ssh_keys(found)


def _show_ssh_keys(found: list[dict[str, Any]]) -> None:
    show_table(
        ("id", "name", "type", "fingerprint", "created"),
        [
            (one["id"], one["name"], one["keyType"], one["fingerprint"], one["createdAt"])
            for one in found
        ],
    )


@ssh_key.command("remove", hidden=True)
@ssh_key.command("delete")
def delete_ssh_keys(
    references: Annotated[list[str], typer.Argument(help="Ids or names.")],
    as_json: Json = False,
) -> None:
    """Delete public keys. Sandboxes that accepted them through their ids no longer do."""
    with open_client() as client:
        ids = {one["name"]: one["id"] for one in _all(client, _SSH_KEYS)}

        def delete(one: str) -> str:
            client.ask("DELETE", f"{_SSH_KEYS}/{ids.get(one, one)}")
            return f"deleted {one}"

        for_each(references, delete, as_json=as_json)


def usage(
    period: Annotated[str, typer.Option(help=f"One of {', '.join(_PERIODS)}.")] = "current",
    everybody: Annotated[bool, typer.Option("--all", help="For all members. Admins only.")] = False,
    as_json: Json = False,
) -> None:
    """Show the usage and cost of your sandboxes. `current` is this month."""
    if period not in _PERIODS:
        raise typer.BadParameter(f"{period!r} is none of {', '.join(_PERIODS)}")
    with open_client() as client:
        query = {"period": period, "all": str(everybody).lower()}
        used = client.ask("GET", "/v1/billing/my-usage", query=query)["data"]
        try:
            balance = client.ask("GET", "/v1/billing/credits")["data"]["balanceCents"]
        except ApiError:  # a key that may not see it
            balance = None
    if as_json:
        show_json(used)
        return
    run = used["sandboxRuntime"]
    show_table(
        ("since", "hours", "vCPU hours", "GiB hours", "cost"),
        [
            (
                used["since"] or "", f"{run['seconds'] / 3600:.2f}",
                f"{run['vcpuSeconds'] / 3600:.2f}", f"{run['memoryGibSeconds'] / 3600:.2f}",
                f"{run['costCents'] / 100:.2f}",
            )
        ],
    )  # fmt: skip
    if balance is not None:
        typer.echo(f"credits left: {balance / 100:.2f}", err=True)
