"""`sandyard registry …`: credentials for registries of container images."""

from pathlib import Path
from typing import Annotated

import typer

from sandyard.cli.credentials import secret_of
from sandyard.cli.output import Json, for_each, show_json, show_table
from sandyard.cli.sandbox import open_client

app = typer.Typer(help="Keep credentials for registries of container images.", no_args_is_help=True)


@app.command()
def add(
    host: Annotated[str, typer.Argument(help="The registry, such as ghcr.io or docker.io.")],
    username: Annotated[str, typer.Option("--username", "-u", help="The name.")],
    password_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the password or token, or - for standard input. Default: a prompt, "
            "or standard input if piped."
        ),
    ] = None,
) -> None:
    """Keep a name and a password for a registry, and print the id by which builds name them."""
    password = secret_of(None, password_file, what="password", option="--password-file")
    with open_client() as client:
        typer.echo(client.add_registry_credential(host, username, password).id)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the credentials, newest first. Passwords are never shown."""
    with open_client() as client:
        found = client.registry_credentials()
    if as_json:
        show_json([dict(one.raw) for one in found])
        return
    show_table(
        ("id", "host", "username", "created"),
        [(one.id, one.host, one.username, one.raw["createdAt"]) for one in found],
    )


@app.command()
def delete(ids: Annotated[list[str], typer.Argument(help="Ids.")], as_json: Json = False) -> None:
    """Delete credentials."""
    with open_client() as client:

        def delete_one(credential: str) -> str:
            client.delete_registry_credential(credential)
            return f"deleted {credential}"

        for_each(ids, delete_one, as_json=as_json)
