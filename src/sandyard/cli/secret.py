"""`sandyard secret …`: secrets that requests of sandboxes are given outside the machine."""

from pathlib import Path
from typing import Annotated

import typer

from sandyard.cli.credentials import secret_of
from sandyard.cli.output import Json, for_each, show_json, show_table
from sandyard.cli.sandbox import open_client
from sandyard.client import ExistsError

app = typer.Typer(
    help="Keep secrets that requests of sandboxes are given outside the machine.",
    no_args_is_help=True,
)


@app.command("set")
def set_(
    name: Annotated[str, typer.Argument(help="The name, by which network rules mean it.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="A host that it may be sent to; *.example.com for all below. May be repeated. "
            "Default for a secret that is there: as before."
        ),
    ] = None,
    value_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the value, or - for standard input. Default: a prompt, or standard "
            "input if piped."
        ),
    ] = None,
) -> None:
    """Keep a secret, or replace its value: requests are given the new one at once."""
    value = secret_of(None, value_file, what="value", option="--value-file")
    with open_client() as client:
        known = {one.name for one in client.secrets()}
        if name.upper() not in known:
            if not host:
                raise typer.BadParameter("say by --host which hosts it may be sent to")
            try:
                client.add_secret(name, value, host)
            except ExistsError:  # another has added it meanwhile
                client.replace_secret(name, value, hosts=host)
        else:
            client.replace_secret(name, value, hosts=host or None)
    typer.echo(f"set {name.upper()}")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the secrets by name. Values are never shown."""
    with open_client() as client:
        found = client.secrets()
    if as_json:
        show_json([dict(one.raw) for one in found])
        return
    show_table(
        ("name", "hosts", "changed", "last used"),
        [
            (one.name, ", ".join(one.hosts), one.raw["changedAt"], one.last_used_at or "-")
            for one in found
        ],
    )


@app.command()
def delete(
    names: Annotated[list[str], typer.Argument(help="Names.")], as_json: Json = False
) -> None:
    """Delete secrets. Requests that need them are refused from then on."""
    with open_client() as client:

        def delete_one(name: str) -> str:
            client.delete_secret(name)
            return f"deleted {name}"

        for_each(names, delete_one, as_json=as_json)
