"""Commands for the operator of an installation; they need the package's extra `server`."""

import asyncio
import gc
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandyard.cli.credentials import secret_of
from sandyard.cli.output import Json, note_copy, out, plain, show_json
from sandyard.client.config import ClientConfig, config_path, known_key, write_config

if TYPE_CHECKING:
    from sandyard.server.app.settings import Settings

_log = logging.getLogger(__name__)
nodes = typer.Typer(help="Run this host's node, of an installation on several hosts.")
setup = typer.Typer(help="Fetch what the system's packages do not bring.", no_args_is_help=True)


def server_module(module: str) -> Any:
    """Return a module of the server; imported late, so that client users need no server extras."""
    path = f"sandyard.server.app.{module}"
    if path in sys.modules:
        return sys.modules[path]
    # Nothing is garbage: collecting while modules are loaded, and once more
    # at the end, takes a third of the time.
    gc.disable()
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"this command needs the server ({error.name} is missing): "
            "install the package with its extra `server`, as scripts/up does"
        ) from error
    finally:
        gc.freeze()
        gc.enable()


def server_errors() -> type[Exception]:
    """Return the base of the server's own errors; where it is not installed, none is raised."""
    try:
        base: type[Exception] = importlib.import_module("sandyard.server.core.errors").SandyardError
    except ModuleNotFoundError:
        return ConnectionError
    return base


def server_settings() -> "Settings":
    """Return the installation's settings, and have its log written as they say."""
    # Machines run under accounts of their own and must reach their files; what is secret is made
    # with a mode of its own.
    os.umask(0o022)
    reader = server_module("settings_reader")
    settings: Settings = reader.read_settings()
    server_module("logs").set_up_logs(level=settings.log.level, form=settings.log.format)
    for sentence in reader.unknown_variables():
        _log.warning(sentence)
    return settings


def serve() -> None:
    """Run the server until it is stopped. Machines keep running."""
    asyncio.run(server_module("serve").serve(_logged_settings()))


def control() -> None:
    """Run a control plane of an installation on several hosts; see docs/howto/cluster.md."""
    asyncio.run(server_module("cluster").serve_cluster_control(_logged_settings()))


@nodes.callback(invoke_without_command=True)
def node(context: typer.Context) -> None:
    """Run this host's node until it is stopped; machines keep running."""
    if context.invoked_subcommand is None:
        asyncio.run(server_module("member").serve_node(_logged_settings()))


@nodes.command()
def join(
    address: Annotated[str, typer.Argument(help="A control plane's HOST:PORT.")],
    invite: Annotated[
        str | None,
        typer.Argument(
            help="The invite. Other users of this machine can see it in the process list."
        ),
    ] = None,
    invite_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the invite, or - for standard input. Default: a prompt, or "
            "standard input if piped."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The node's name. Default: the host name.")
    ] = None,
    start: Annotated[
        bool, typer.Option("--start/--no-start", help="Run the node after joining.")
    ] = True,
) -> None:
    """Join this host to an installation as a node, and run it."""
    token = secret_of(invite, invite_file, what="invite", option="--invite-file")
    settings = _logged_settings()
    node_id = asyncio.run(server_module("member").join(settings, address, token, name=name))
    typer.echo(f"this host is the node {node_id} now; `sandyard node` starts it from now on")
    if start:
        asyncio.run(server_module("member").serve_node(settings))


def _logged_settings() -> "Settings":
    settings = server_settings()
    log = settings.log
    server_module("logs").set_up_logs(
        level=log.level, form=log.format, file=log.file, file_mib=log.file_mib
    )
    return settings


def init(
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
) -> None:
    """Prepare an installation: database, first organization, and a key for this user."""
    settings = server_settings()
    host = "127.0.0.1" if settings.http.host in ("0.0.0.0", "::") else settings.http.host  # noqa: S104
    url = f"http://{host}:{settings.http.port}"
    key = asyncio.run(server_module("admin").ensure_key(settings, known_key(url)))
    note_copy(write_config(ClientConfig(url, key)))
    if not quiet:
        typer.echo(f"URL and key are in {config_path()}")


def stop(
    everything: Annotated[
        bool, typer.Option("--all", help="Also delete all sandboxes and their machines.")
    ] = False,
) -> None:
    """Stop the server. Machines keep running, and the next server adopts them."""
    settings = server_settings()
    installation = server_module("installation")
    pid = installation.stop_server(settings.home)
    typer.echo(f"stopped the server (pid {pid})" if pid else "no server was running")
    if everything:
        removed = asyncio.run(server_module("serve").remove_everything(settings))
        typer.echo(f"deleted {removed} sandboxes; images and database are kept")
        return
    living = installation.living_machines(settings.home)
    if living:
        typer.echo(f"{len(living)} machines live on: {', '.join(living)}")
        typer.echo("remove them too with: scripts/down --all")


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all files of templates, and verify them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this host: list each problem and the command that fixes it."""
    settings = server_settings()
    _show(asyncio.run(server_module("doctor").collect(settings, deep=deep)), as_json=as_json)


def upgrade(
    check: Annotated[
        bool, typer.Option("--check", help="Say what the upgrade will do, and change nothing.")
    ] = False,
) -> None:
    """Say what an upgrade to this version will do to the installation on this host."""
    if not check:
        raise typer.BadParameter(
            "Sandyard does not upgrade itself; `sandyard upgrade --check` says what an upgrade to "
            "this version will do, and docs/howto/upgrade.md how to do it"
        )
    settings = server_settings()

    async def found() -> list[Any]:
        return [one async for one in server_module("upgrades").check(settings)]

    _show(asyncio.run(found()))


def _show(findings: list[Any], *, as_json: bool = False) -> None:
    if as_json:
        show_json([{"level": one.level, "what": one.what, "mend": one.mend} for one in findings])
    else:
        for finding in findings:
            _show_finding(finding)
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(1)


def _show_finding(finding: Any) -> None:
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    out.print(f"{finding.level:4}", style=colours[finding.level], end=" ")
    out.print(plain(finding.what))
    if finding.mend:
        out.print(f"     → {plain(finding.mend)}")


@setup.callback()
def _setup() -> None:
    """Fetch what the system's packages do not bring."""


@setup.command()
def firecracker(
    force: Annotated[
        bool, typer.Option("--force", help="Install it even if this host cannot use it.")
    ] = False,
) -> None:
    """Install Firecracker's official release if this host can use it. Otherwise QEMU is used."""
    settings = server_settings()
    summary = asyncio.run(
        server_module("wiring").set_up_firecracker(settings, force=force, progress=typer.echo)
    )
    typer.echo(summary)


def build_shipped(slugs: list[str], *, again: bool) -> None:
    """Build templates of the installation that are not up to date."""
    settings = server_settings()
    server_module("installation").forget_environment()
    asyncio.run(server_module("wiring").check_home(settings))
    builder = server_module("wiring").builder_of(settings)
    for slug in slugs:
        with out.status(f"building {slug}") as spinner:

            def progress(text: str, *, spinner: Any = spinner, slug: str = slug) -> None:
                out.print(f"{slug}: {plain(text)}")
                spinner.update(f"{slug}: {text}")

            asyncio.run(builder.build(slug, progress=progress, again=again))


def shipped_rows() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a table of the installation's templates, and whether they are built on this host."""
    rows: list[tuple[str, ...]] = []
    for fact in server_module("wiring").images_of(server_settings()).facts():
        size = f"{fact.size_bytes // 2**20} MiB" if fact.size_bytes else ""
        why = fact.error.splitlines()[0] if fact.error else ""
        rows.append((fact.slug, fact.status.value, fact.os or "", size, fact.digest or "", why))
    return ("slug", "status", "os", "size", "digest", "error"), rows
