"""`sandyard snapshot …`: sandboxes as they were, to start others from or go back to."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sandyard.cli.sandbox import Json, Reference, open_client
from sandyard.client import Snapshot

app = typer.Typer(help="Save sandboxes as they are now.", no_args_is_help=True)
out = Console()


def _show(snapshots: list[Snapshot], *, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps([dict(one.raw) for one in snapshots]))
        return
    table = Table("id", "name", "sandbox", "MB", "created", box=None)
    for one in snapshots:
        size = str(one.size_bytes // 2**20)
        table.add_row(one.id, one.name or "", one.sandbox_id, size, one.created_at)
    out.print(table)


@app.command()
def create(
    reference: Reference,
    name: Annotated[str | None, typer.Option(help="A name of your own for it.")] = None,
    as_json: Json = False,
) -> None:
    """Save a sandbox as it is now; it goes on running."""
    with open_client() as client:
        _show([client.snapshot(reference, name)], as_json=as_json)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List snapshots, newest first."""
    with open_client() as client:
        _show(list(client.snapshots()), as_json=as_json)


@app.command()
def delete(references: Annotated[list[str], typer.Argument(help="Ids or names.")]) -> None:
    """Delete snapshots; what was made from them lives on."""
    with open_client() as client:
        for reference in references:
            client.delete_snapshot(reference)
            typer.echo(f"deleted {reference}")
