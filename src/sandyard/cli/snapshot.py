"""`sandyard snapshot …`: sandboxes as they were, to start others from or go back to."""

from typing import Annotated

import typer

from sandyard.cli.output import Json, for_each, show_json, show_table
from sandyard.cli.sandbox import Reference, open_client
from sandyard.client import Snapshot

app = typer.Typer(help="Save sandboxes as they are now.", no_args_is_help=True)


def _show(snapshots: list[Snapshot]) -> None:
    show_table(
        ("id", "name", "sandbox", "MB", "created"),
        [
            (one.id, one.name or "", one.sandbox_id, str(one.size_bytes // 2**20), one.created_at)
            for one in snapshots
        ],
    )


@app.command()
def create(
    reference: Reference,
    name: Annotated[str | None, typer.Option(help="A name.")] = None,
    as_json: Json = False,
) -> None:
    """Save the current state of a sandbox, which keeps running."""
    with open_client() as client:
        made = client.snapshot(reference, name)
    if as_json:
        show_json(dict(made.raw))
    else:
        _show([made])


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List snapshots, newest first."""
    with open_client() as client:
        found = list(client.snapshots())
    if as_json:
        show_json([dict(one.raw) for one in found])
    else:
        _show(found)


@app.command()
def delete(
    references: Annotated[list[str], typer.Argument(help="Ids or names.")], as_json: Json = False
) -> None:
    """Delete snapshots. Sandboxes created from them are not affected."""
    with open_client() as client:

        def delete_one(reference: str) -> str:
            client.delete_snapshot(reference)
            return f"deleted {reference}"

        for_each(references, delete_one, as_json=as_json)
