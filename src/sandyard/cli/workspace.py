"""`sandyard workspace …`: folders that outlive sandboxes."""

from typing import Annotated

import typer

from sandyard.cli.output import Json, for_each, show_json, show_table
from sandyard.cli.sandbox import open_client
from sandyard.client import Workspace, WorkspaceEntry

app = typer.Typer(
    help="Directories that outlive sandboxes. `sandyard cp` takes files in and out: @NAME:PATH.",
    no_args_is_help=True,
)

Which = Annotated[str, typer.Argument(metavar="WORKSPACE", help="Its id or slug.")]


def _show(found: list[Workspace]) -> None:
    show_table(
        ("id", "slug", "name", "MB", "of", "created"),
        [
            (
                one.id, one.slug, one.name, str(-(-one.size_bytes // 2**20)),
                str(one.quota_bytes // 2**20), one.created_at,
            )
            for one in found
        ],
    )  # fmt: skip


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The name.")],
    slug: Annotated[
        str | None, typer.Option(help="A short name for commands. Default: derived from the name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a workspace."""
    with open_client() as client:
        made = client.create_workspace(name, slug=slug)
    if as_json:
        show_json(dict(made.raw))
    else:
        _show([made])


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List workspaces, newest first."""
    with open_client() as client:
        found = client.workspaces()
    if as_json:
        show_json([dict(one.raw) for one in found])
    else:
        _show(found)


@app.command()
def rename(workspace: Which, name: Annotated[str, typer.Argument(help="The new name.")]) -> None:
    """Rename a workspace. Its slug does not change."""
    with open_client() as client:
        _show([client.rename_workspace(workspace, name)])


@app.command()
def delete(
    workspaces: Annotated[list[str], typer.Argument(help="Ids or slugs.")],
    force: Annotated[
        bool, typer.Option("--force", help="Delete them even if sandboxes have them mounted.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete workspaces and their files."""
    with open_client() as client:

        def delete_one(reference: str) -> str:
            client.delete_workspace(reference, force=force)
            return f"deleted {reference}"

        for_each(workspaces, delete_one, as_json=as_json)


@app.command()
def ls(
    workspace: Which,
    path: Annotated[str, typer.Argument(help="A directory in it.")] = "/",
    as_json: Json = False,
) -> None:
    """List a directory of a workspace."""
    with open_client() as client:
        found = client.workspace_files(workspace).list(path)
    if as_json:
        show_json([dict(one.raw) for one in found])
    else:
        show_table(("name", "bytes", "changed"), [_row(one) for one in found])


def _row(one: WorkspaceEntry) -> tuple[str, str, str]:
    return (one.name + "/", "", one.modified_at) if one.is_folder else (
        one.name, str(one.size), one.modified_at,
    )  # fmt: skip


@app.command()
def mv(
    workspace: Which,
    source: Annotated[str, typer.Argument(help="A file or directory in it.")],
    target: Annotated[str, typer.Argument(help="A directory to move it into, or its new path.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing target.")
    ] = False,
) -> None:
    """Move or rename a file or directory in a workspace."""
    with open_client() as client:
        moved = client.workspace_files(workspace).move(source, target, overwrite=overwrite)
    typer.echo(f"it is {moved.path}")


@app.command()
def rm(
    workspace: Which,
    paths: Annotated[list[str], typer.Argument(help="Files and directories in it.")],
    as_json: Json = False,
) -> None:
    """Delete files, and directories with their contents, in a workspace."""
    with open_client() as client:
        files = client.workspace_files(workspace)

        def remove_one(path: str) -> str:
            files.remove(path)
            return f"removed {path}"

        for_each(paths, remove_one, as_json=as_json)
