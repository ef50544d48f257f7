"""`sandyard sandbox …`: what a user does with sandboxes."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from sandyard.cli.output import for_each, plain, show_json, show_table, write_raw
from sandyard.cli.terminal import CUT, run_attached
from sandyard.client import ConfigError, NotReadyError, Sandbox, Sandyard, SandyardError

app = typer.Typer(help="Create, use and delete sandboxes.", no_args_is_help=True)
_BROKEN = ("failed", "error")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _known(incomplete: str) -> list[str]:
    """Return the sandboxes that begin so, for the shell's completion."""
    try:
        with Sandyard(retries=0) as client:
            found = [one.name or one.id for one in client.list()]
    except (SandyardError, ConfigError):
        return []
    return [one for one in found if one.startswith(incomplete)]


Reference = Annotated[str, typer.Argument(help="The sandbox's id or name.", autocompletion=_known)]
References = Annotated[list[str], typer.Argument(help="Ids or names.", autocompletion=_known)]


def open_client() -> Sandyard:
    """Return a client of the server that this user's configuration names."""
    return Sandyard()


def own_words(command: list[str] | None) -> list[str]:
    """Return a command without the -- before it; options of ours come before the sandbox's name."""
    words = command or []
    if words[:1] == ["--"]:
        return words[1:]
    if words and words[0].startswith("-"):
        raise typer.BadParameter(
            f"{words[0]} comes too late: options stand before the sandbox, and everything after it "
            "is the command"
        )
    return words


def _show(sandboxes: Sequence[Sandbox]) -> None:
    show_table(
        ("id", "name", "status", "template", "shape", "created"), [_row(one) for one in sandboxes]
    )


def _show_one(sandbox: Sandbox, *, as_json: bool) -> None:
    if as_json:
        show_json(dict(sandbox.raw))
        return
    _show([sandbox])
    if said := _why(sandbox):
        typer.echo(f"it is {sandbox.status}: {said}", err=True)


def _row(one: Sandbox) -> tuple[str, ...]:
    given = one.raw["resources"]
    shape = f"{given['vcpus']} vcpu, {given['memory']}, {given['disk']}"
    return (one.id, one.name or "", one.status, one.template, shape, one.created_at)


def _why(sandbox: Sandbox) -> str:
    return plain(str((sandbox.raw.get("statusReason") or {}).get("message", "")))


@app.command()
def create(
    template: Annotated[
        str | None, typer.Option(help="What it is made from; base-ubuntu if nothing is said.")
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="A snapshot to make it from instead, by id or name.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name of your own for it.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be repeated.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be repeated.")] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            help="WORKSPACE:/workspace, or a path below it, and :ro to only read; may be repeated."
        ),
    ] = None,
    vcpus: Annotated[int | None, typer.Option(help="Virtual CPUs.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory, such as 2GB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Disk, such as 20GB.")] = None,
    password: Annotated[
        str | None, typer.Option(help="A password for root in it, 8 to 72 characters.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="The project that it belongs to.")] = None,
    expires_in: Annotated[
        int | None, typer.Option(help="Seconds until it is deleted by itself.")
    ] = None,
    on_expiry: Annotated[
        str | None,
        typer.Option(help="What is done then instead: pause; a resume begins its time anew."),
    ] = None,
    idle_timeout: Annotated[
        int | None, typer.Option(help="Seconds without use until it is paused; 0: never.")
    ] = None,
    wait: Annotated[int, typer.Option(help="Seconds to wait until it runs.")] = 60,
    as_json: Json = False,
) -> None:
    """Create a sandbox."""
    asked = {"vcpus": vcpus, "memory": memory, "disk": disk}
    options: dict[str, Any] = {
        "tags": tag or [],
        "env": dict(_pair(one) for one in env or []),
        "resources": {key: value for key, value in asked.items() if value is not None},
    }
    given = {
        "name": name, "snapshot": snapshot, "idleTimeout": idle_timeout, "projectId": project,
        "rootPassword": password, "expiresIn": expires_in,
        "onExpiry": on_expiry,
    }  # fmt: skip
    options |= {key: value for key, value in given.items() if value is not None}
    with open_client() as client:
        until = time.monotonic() + wait
        if mount:
            options["mounts"] = _mounts(client, mount)
        sandbox = client.create(template, wait_s=wait, **options)
        with suppress(NotReadyError):  # what became of it is shown
            sandbox.wait_until_ready(until - time.monotonic())
    _show_one(sandbox, as_json=as_json)
    if sandbox.status in _BROKEN:
        raise typer.Exit(1)


def _mounts(client: Sandyard, wanted: list[str]) -> list[dict[str, Any]]:
    """Return what is to be mounted; workspaces are named by id or slug."""
    ids = {name: one.id for one in client.workspaces() for name in (one.slug, one.id)}
    found = []
    for one in wanted:
        reference, _, rest = one.partition(":")
        path, _, mode = rest.partition(":")
        if mode not in ("", "ro", "rw"):
            raise typer.BadParameter(f"{one!r}: what follows the path is ro or rw")
        if reference not in ids:
            raise typer.BadParameter(
                f"there is no workspace {reference!r}; `sandyard workspace list` shows them"
            )
        found.append(
            {
                "workspaceId": ids[reference],
                "path": path or "/workspace",
                "readOnly": mode == "ro",
            }
        )
    return found


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
    return name, value


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="Only those of this status.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only those with this tag.")] = None,
    as_json: Json = False,
) -> None:
    """List sandboxes, newest first."""
    with open_client() as client:
        found = list(client.list(status=status, tags=tag or []))
    if as_json:
        show_json([dict(one.raw) for one in found])
    else:
        _show(found)


@app.command()
def get(reference: Reference, as_json: Json = False) -> None:
    """Show one sandbox, and why it is as it is."""
    with open_client() as client:
        _show_one(client.get(reference), as_json=as_json)


@app.command(name="exec", context_settings={"allow_interspersed_args": False})
def execute(
    reference: Reference,
    command: Annotated[
        list[str] | None,
        typer.Argument(help="The command, as you would type it; a shell with -t if not said."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds it may take; 30, or with -i or -t as long as it likes."),
    ] = None,
    cwd: Annotated[str, typer.Option(help="The folder to run it in.")] = "/workspace",
    user: Annotated[str, typer.Option(help="Who runs it.")] = "root",
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Pass on this command's input.")
    ] = False,
    tty: Annotated[
        bool, typer.Option("--tty", "-t", help="Run it on a terminal, which is this one.")
    ] = False,
    stdin: Annotated[bool, typer.Option("--stdin", hidden=True)] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print control characters to a terminal, too.")
    ] = False,
) -> None:
    """Run a command; its output and exit code become this command's.

    One argument is a line for the sandbox's shell; several are a program and its arguments, which
    reach it as they are. `exec -it NAME` is a shell on this terminal.
    """
    command = own_words(command)
    if tty and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise typer.BadParameter("-t needs a terminal, and this is none; leave it out")
    if not command and not tty:
        raise typer.BadParameter("say which command; a shell on this terminal is `exec -it NAME`")
    with open_client() as client:
        if interactive or stdin or tty:
            code = run_attached(
                client,
                reference,
                command,
                has_terminal=tty,
                has_input=interactive or stdin,
                cwd=cwd,
                user=user,
                timeout_s=timeout,
                raw=raw,
            )
            raise typer.Exit(code)
        result = client.execute(
            reference,
            command[0] if len(command) == 1 else command,
            timeout_s=30.0 if timeout is None else timeout,
            cwd=cwd,
            user=user,
        )
    write_raw(sys.stdout, result.stdout_bytes, raw=raw)
    write_raw(sys.stderr, result.stderr_bytes, raw=raw)
    if result.timed_out:
        typer.echo(f"the command was ended after {timeout or 30:g} s", err=True)
    if result.truncated:
        typer.echo(
            "the output was cut: 16 MiB of a stream are kept, or less where the server has no room",
            err=True,
        )
    raise typer.Exit(result.exit_code or (CUT if result.truncated else 0))


@app.command()
def pause(references: References) -> None:
    """Save sandboxes to disk, processes and all, and give their memory back."""
    with open_client() as client:

        def pause_one(reference: str) -> str:
            client.pause(reference)
            return f"paused {reference}"

        for_each(references, pause_one)


@app.command()
def resume(references: References) -> None:
    """Let paused sandboxes go on where they stood."""
    with open_client() as client:

        def resume_one(reference: str) -> str:
            said = _why(client.resume(reference))
            return f"resumed {reference}{f' ({said})' if said else ''}"

        for_each(references, resume_one)


@app.command()
def restart(references: References) -> None:
    """Boot sandboxes from their own disks, also such as do not answer; memory is given up."""
    with open_client() as client:

        def restart_one(reference: str) -> str:
            client.restart(reference)
            return f"restarted {reference}"

        for_each(references, restart_one)


@app.command()
def logs(reference: Reference) -> None:
    """Print the last of what a sandbox's machine said on its console."""
    with open_client() as client:
        typer.echo(plain(client.logs(reference).replace("\r", "")))


@app.command()
def fork(
    reference: Reference,
    count: Annotated[int, typer.Option(help="How many, 1 to 100.")] = 1,
    name: Annotated[
        str | None, typer.Option(help="A name of your own; of several, each has its number.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make sandboxes that begin as this one is now: files, memory and processes."""
    with open_client() as client:
        made = client.fork(reference, count, name=name)
    if as_json:
        show_json([dict(one.raw) for one in made])
    else:
        _show(made)


@app.command()
def rollback(
    reference: Reference,
    snapshot: Annotated[str, typer.Argument(help="A snapshot of it, by id or name.")],
) -> None:
    """Put a sandbox back to one of its snapshots; what it was until then is lost."""
    with open_client() as client:
        client.roll_back(reference, snapshot)
    typer.echo(f"{reference} is as it was in {snapshot}")


@app.command("delete", hidden=True)
@app.command()
def destroy(references: References) -> None:
    """Delete sandboxes and wait until they are gone."""
    with open_client() as client:

        def delete_one(reference: str) -> str:
            client.delete(reference)
            return f"destroyed {reference}"

        for_each(references, delete_one)
