"""`sandyard backup` and `sandyard restore`: for the operator, on the host."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sandyard.cli.credentials import secret_of
from sandyard.cli.output import plain, show_table
from sandyard.cli.server import server_module, server_settings

File = Annotated[Path, typer.Argument(help="The file of the backup.", metavar="FILE")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="A file with the passphrase. Default: backup.passphrase_file, a prompt, or standard "
        "input if piped."
    ),
]


def _passphrase(file: Path | None, configured: Path | None) -> str:
    return secret_of(None, file or configured, what="passphrase", option="--passphrase-file")


class Include(StrEnum):
    """What a backup may contain in addition to the database."""

    PAUSED = "paused"
    SNAPSHOTS = "snapshots"
    WORKSPACES = "workspaces"
    TEMPLATES = "templates"


def backup(
    file: File,
    include: Annotated[
        list[Include] | None,
        typer.Option(
            help="Also the files of paused sandboxes, snapshots, workspaces, or templates of "
            "users. May be repeated."
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Back up the installation to a new file: database, keys, settings and templates."""
    settings = server_settings()
    passphrase = _passphrase(passphrase_file, settings.backup.passphrase_file)
    about = server_module("backups").backup(
        settings, file, passphrase, include=include or (), progress=typer.echo
    )
    size = file.stat().st_size / 2**20
    rows = ", ".join(f"{count} {name}" for name, count in about.rows.items())
    typer.echo(f"{file}: {size:.1f} MiB" + (f"; {rows}" if rows else ""))
    typer.echo("keep the passphrase: the backup cannot be read without it")


def restore(
    file: File,
    check: Annotated[
        bool, typer.Option("--check", help="Only show what would change; change nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an installation of another key.")
    ] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Put the installation back as it was in a backup. Replaced files are kept beside."""
    settings = server_settings()
    backups = server_module("backups")
    passphrase = _passphrase(passphrase_file, settings.backup.passphrase_file)
    if check:
        about, found = backups.compare(settings, file, passphrase)
        typer.echo(_shown(about))
        show_table(
            ("what", "here", "in the backup"), [(one.what, one.here, one.there) for one in found]
        )
        return
    about, replaced = backups.restore(settings, file, passphrase, force=force, progress=typer.echo)
    typer.echo(f"restored {_shown(about)}")
    if replaced is not None:
        typer.echo(f"what was replaced is in {replaced}; remove it when all is well")
    typer.echo("start the server with scripts/up")


def _shown(about: object) -> str:
    values = vars(about)
    return plain(
        f"the backup of {values['created_at']} from {values['host']}:{values['home']} "
        f"(Sandyard {values['version']})"
    )
