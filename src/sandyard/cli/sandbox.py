"""`sandyard sandbox …`: what a user does with sandboxes."""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from itertools import islice
from typing import Annotated, Any

import typer

from sandyard.cli.output import (
    Json,
    for_each,
    plain,
    show_json,
    show_records,
    show_table,
    write_raw,
)
from sandyard.cli.terminal import leaving, run_attached, run_to_end, show_output
from sandyard.client import (
    ConfigError,
    ExecResult,
    NotReadyError,
    ProcessInfo,
    Sandbox,
    Sandyard,
    SandyardError,
)
from sandyard.client.calls import line_of, milliseconds
from sandyard.client.options import ProcessOptions

app = typer.Typer(help="Create, use and delete sandboxes.", no_args_is_help=True)
_BROKEN = ("failed", "error")
_LOOK_S = 1.0


def _known(incomplete: str) -> list[str]:
    """Return the sandboxes that begin so, for the shell's completion."""
    try:
        with Sandyard(retries=0) as client:
            found = [one.name or one.id for one in client.list()]
    except (SandyardError, ConfigError):
        return []
    return [one for one in found if one.startswith(incomplete)]


def known_templates(incomplete: str) -> list[str]:
    """Return the templates that begin so, for the shell's completion."""
    try:
        with Sandyard(retries=0) as client:
            return [one.slug for one in client.templates() if one.slug.startswith(incomplete)]
    except (SandyardError, ConfigError):
        return []


Reference = Annotated[str, typer.Argument(help="The sandbox's id or name.", autocompletion=_known)]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="What it may reach: a name, *.NAME, NAME:PORT or a range. May be repeated."),
]
Deny = Annotated[
    list[str] | None, typer.Option(help="A range that it may not reach. May be repeated.")
]
Inspect = Annotated[
    list[str] | None,
    typer.Option(help="A host whose requests are each judged, inside TLS. May be repeated."),
]
Inject = Annotated[
    list[str] | None,
    typer.Option(
        help="HOST:HEADER:VALUE, a header that requests to a host are given outside the machine; "
        "${NAME} in it is a secret. May be repeated."
    ),
]
References = Annotated[list[str], typer.Argument(help="Ids or names.", autocompletion=_known)]


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str) -> int:
    """Return the seconds of a duration such as 90, 30m or 30d.

    Raises:
        BadParameter: the text is not a duration.
    """
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text.strip(), re.ASCII)
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is not a duration: write seconds, or a unit as in 90s, 30m, 12h, 30d"
        )
    return int(found[1]) * _SECONDS[found[2]]


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


def _show_one(sandbox: Sandbox, *, as_json: bool, whole: bool = False) -> None:
    if as_json:
        show_json(dict(sandbox.raw))
        return
    if whole:
        show_records(*_fields(sandbox))
        return
    _show([sandbox])
    if reason := _why(sandbox):
        typer.echo(f"it is {sandbox.status}: {reason}", err=True)


def _fields(sandbox: Sandbox) -> tuple[list[str], list[list[str]]]:
    """Return the names and values of everything that is known of a sandbox."""
    found: dict[str, str] = {}
    for name, value in sandbox.raw.items():
        if name == "statusReason":
            found["reason"] = _why(sandbox)
        elif isinstance(value, list) and not any(isinstance(one, dict) for one in value):
            found[name] = ", ".join(str(one) for one in value if one is not None)
        elif isinstance(value, dict | list):
            found[name] = json.dumps(value) if value else ""
        elif value is not None:
            found[name] = str(value)
    return list(found), [list(found.values())]


def _row(one: Sandbox) -> tuple[str, ...]:
    given = one.raw["resources"]
    shape = f"{given['vcpus']} vcpu, {given['memory']}, {given['disk']}"
    return (one.id, one.name or "", one.status, one.template, shape, one.created_at)


def _why(sandbox: Sandbox) -> str:
    return plain(str((sandbox.raw.get("statusReason") or {}).get("message", "")))


@app.command()
def create(
    template: Annotated[
        str | None,
        typer.Option(help="The template. Default: base-ubuntu.", autocompletion=known_templates),
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="A snapshot to create it from, by id or name.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag. May be repeated.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE. May be repeated.")] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            help="WORKSPACE:/workspace, or a path below it; append :ro for read-only. May be "
            "repeated."
        ),
    ] = None,
    deny_all: Annotated[
        bool, typer.Option("--deny-all", help="Let it reach nothing but what --allow names.")
    ] = False,
    allow: Allow = None,
    deny: Deny = None,
    inspect: Inspect = None,
    inject: Inject = None,
    vcpus: Annotated[int | None, typer.Option(help="Virtual CPUs.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory, such as 2GB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Disk, such as 20GB.")] = None,
    password: Annotated[
        str | None, typer.Option(help="A root password, 8 to 72 characters.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="The project.")] = None,
    expires_in: Annotated[
        int | None,
        typer.Option(
            help="The time until it is deleted automatically: seconds, or 30m, 12h, 30d.",
            parser=seconds_of,
            metavar="TIME",
        ),
    ] = None,
    on_expiry: Annotated[
        str | None,
        typer.Option(help="`pause`: pause it at that time instead. A resume restarts the period."),
    ] = None,
    idle_timeout: Annotated[
        int | None,
        typer.Option(
            help="The time of inactivity until it is paused: seconds, or 30m, 12h. 0: never.",
            parser=seconds_of,
            metavar="TIME",
        ),
    ] = None,
    wait: Annotated[int, typer.Option(help="Seconds to wait until it is running.")] = 60,
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
    if deny_all or allow or deny or inspect or inject:
        egress = "deny" if deny_all else "allow"
        options["network"] = {"egress": egress} | _rules(allow, deny, inspect, inject)
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


@app.command()
def network(
    sandbox: Reference,
    deny_all: Annotated[
        bool, typer.Option("--deny-all", help="Let it reach nothing but what --allow names.")
    ] = False,
    allow_all: Annotated[
        bool, typer.Option("--allow-all", help="Let it reach everything but what --deny names.")
    ] = False,
    allow: Allow = None,
    deny: Deny = None,
    inspect: Inspect = None,
    inject: Inject = None,
    as_json: Json = False,
) -> None:
    """Show what a sandbox may reach, or replace it: all earlier rules go."""
    if deny_all and allow_all:
        raise typer.BadParameter("--deny-all and --allow-all exclude each other")
    if (allow or deny or inspect or inject) and not (deny_all or allow_all):
        raise typer.BadParameter("say --deny-all or --allow-all, too: all earlier rules go")
    with open_client() as client:
        if deny_all or allow_all:
            egress = "deny" if deny_all else "allow"
            asked = _rules(allow, deny, inspect, inject)
            rules = client.set_network(sandbox, egress=egress, **asked)
        else:
            rules = client.network(sandbox)
    if as_json:
        show_json(dict(rules))
        return
    for rule in rules["allow"]:
        typer.echo(f"allow  {rule}")
    for rule in rules["deny"]:
        typer.echo(f"deny   {rule}")
    for host in rules["inspect"]:
        typer.echo(f"inspect  {host}")
    for one in rules["inject"]:
        for name, text in one["headers"].items():
            typer.echo(f"inject   {one['host']}  {name}: {text}")
    typer.echo(f"{rules['egress']:<5}  everything else")


@app.command()
def egress(
    sandbox: Reference,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a sandbox with network rules reached or was refused, oldest first."""
    since = None
    with open_client() as client, suppress(KeyboardInterrupt):
        while True:
            found = client.connections(sandbox, since=since)
            for one in found:
                typer.echo(json.dumps(dict(one)) if as_json else _connection(one))
            if not follow:
                return
            if found:
                since = datetime.fromisoformat(found[-1]["time"]).timestamp()
            elif since is None:
                since = 0.0
            time.sleep(1)


def _connection(one: Mapping[str, Any]) -> str:
    if one["verdict"] == "skipped":
        return f"{one['time']}  ({one['count']} lines were left out)"
    where = one["name"] or one["address"]
    passed = f"  {one['bytesOut']} B out, {one['bytesIn']} B in, {one['durationMs']} ms"
    end = passed if one["verdict"] == "allowed" else ""
    end += f", with {', '.join(one['secrets'])}" if one["secrets"] else ""
    return f"{one['time']}  {one['verdict']:<7}  {where}:{one['port']}  ({one['rule']}){end}"


def _rules(
    allow: list[str] | None,
    deny: list[str] | None,
    inspect: list[str] | None,
    inject: list[str] | None,
) -> dict[str, Any]:
    """Return network rules, but for what happens to everything else."""
    headers: dict[str, dict[str, str]] = {}
    for one in inject or []:
        host, _, header = one.partition(":")
        name, separator, text = header.partition(":")
        if not separator or not text.strip():
            raise typer.BadParameter(
                f"{one!r}: it is HOST:HEADER:VALUE, such as "
                "'api.github.com:Authorization: Bearer ${GITHUB}'"
            )
        headers.setdefault(host.strip(), {})[name.strip()] = text.strip()
    return {
        "allow": allow or [],
        "deny": deny or [],
        "inspect": inspect or [],
        "inject": [{"host": host, "headers": each} for host, each in headers.items()],
    }


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
    status: Annotated[str | None, typer.Option(help="Only sandboxes in this status.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only sandboxes with this tag.")] = None,
    node: Annotated[
        str | None,
        typer.Option(help="Only sandboxes on the node with this id; for admins.", metavar="NODE"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
    as_json: Json = False,
) -> None:
    """List sandboxes, newest first."""
    with open_client() as client:
        found = list(islice(client.list(status=status, tags=tag or [], node_id=node), limit))
    if as_json:
        show_json([dict(one.raw) for one in found])
    else:
        _show(found)


@app.command()
def get(reference: Reference, as_json: Json = False) -> None:
    """Show all of one sandbox, and the reason for its status."""
    with open_client() as client:
        _show_one(client.get(reference), as_json=as_json, whole=True)


@app.command(name="exec", context_settings={"allow_interspersed_args": False})
def execute(
    reference: Reference,
    command: Annotated[
        list[str] | None,
        typer.Argument(help="The command. With -t and no command, a shell."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="The time limit in seconds. Default: 30; with -i or -t, none."),
    ] = None,
    cwd: Annotated[
        str | None,
        typer.Option(help="The working directory. Default: the template's, else /workspace."),
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="The user. Default: the template's, else root.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Forward standard input.")
    ] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Allocate a terminal.")] = False,
    stdin: Annotated[bool, typer.Option("--stdin", hidden=True)] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print control characters to the terminal unchanged.")
    ] = False,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", "-d", help="Start it and print its pid. No time limit unless given."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a command. Its output, as it comes, and its exit code become this command's.

    A single argument is a line for the sandbox's shell. Several are a program and its arguments,
    passed unchanged. `exec -it NAME` opens a shell on this terminal. `exec -d NAME` leaves the
    command running; `ps` and `logs` show it. With `--json`, print the result at the end.
    """
    command = own_words(command)
    if (detach or as_json) and (tty or interactive or stdin):
        raise typer.BadParameter("-i and -t exclude -d and --json")
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
        # For the shell, which reports a program that does not exist with exit code 127.
        line = line_of(command[0] if len(command) == 1 else command)
        if detach:
            _start(client, reference, line, cwd=cwd, user=user, timeout_s=timeout, as_json=as_json)
            return
        if as_json:
            limit_s = 30.0 if timeout is None else timeout
            result = client.execute(reference, line, timeout_s=limit_s, cwd=cwd, user=user)
            show_json(_result(result))
            raise typer.Exit(result.exit_code)
        limit_ms = milliseconds(30.0 if timeout is None else timeout)
        with leaving():
            process = client.processes(reference).start(line, cwd=cwd, user=user, timeout=limit_ms)
            code = run_to_end(process, raw=raw)
    raise typer.Exit(code)


def _start(
    client: Sandyard,
    reference: str,
    line: str,
    *,
    cwd: str | None,
    user: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Start a command in the background, and print its pid."""
    options: ProcessOptions = {"cwd": cwd, "user": user}
    if timeout_s is not None:
        options["timeout"] = milliseconds(timeout_s)
    process = client.processes(reference).start(line, **options)
    if as_json:
        show_json(dict(process.info().raw))
    else:
        typer.echo(process.name)


def _result(result: ExecResult) -> dict[str, Any]:
    return {
        "exitCode": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "durationMs": result.duration_ms,
        "timedOut": result.timed_out,
        "truncated": result.truncated,
    }


@app.command()
def ps(reference: Reference, as_json: Json = False) -> None:
    """List the processes started through the API, oldest first; ended ones for ten minutes."""
    with open_client() as client:
        found = client.processes(reference).list()
    if as_json:
        show_json([dict(one.raw) for one in found])
        return
    show_table(
        ("pid", "status", "exit code", "started", "tag", "command"),
        [_process(one) for one in found],
    )


def _process(one: ProcessInfo) -> tuple[str, ...]:
    code = "" if one.exit_code is None else str(one.exit_code)
    return (str(one.pid), one.status, code, one.raw["startedAt"], one.tag or "", one.command)


@app.command()
def pause(references: References, as_json: Json = False) -> None:
    """Pause sandboxes: save memory and processes to disk, and free the host's memory."""
    with open_client() as client:

        def pause_one(reference: str) -> str:
            client.pause(reference)
            return f"paused {reference}"

        for_each(references, pause_one, as_json=as_json)


@app.command()
def resume(references: References, as_json: Json = False) -> None:
    """Resume paused sandboxes."""
    with open_client() as client:

        def resume_one(reference: str) -> str:
            reason = _why(client.resume(reference))
            return f"resumed {reference}{f' ({reason})' if reason else ''}"

        for_each(references, resume_one, as_json=as_json)


@app.command()
def restart(references: References, as_json: Json = False) -> None:
    """Reboot sandboxes from their disks, even if they are unresponsive. Memory is lost."""
    with open_client() as client:

        def restart_one(reference: str) -> str:
            client.restart(reference)
            return f"restarted {reference}"

        for_each(references, restart_one, as_json=as_json)


@app.command()
def logs(
    reference: Reference,
    process: Annotated[
        str | None, typer.Argument(help="A pid or tag, as `ps` lists them. Default: the console.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue with new output, until Ctrl-C.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print control characters to the terminal unchanged.")
    ] = False,
) -> None:
    """Print the end of a sandbox's console log, or the output of one of its processes."""
    with open_client() as client, suppress(KeyboardInterrupt) if follow else nullcontext():
        if process is not None:
            show_output(client.processes(reference).get(process), follow=follow, raw=raw)
        elif follow:
            _follow_console(client, reference, raw=raw)
        elif console := _console(client, reference):
            _print_console(f"{console}\n", raw=raw)
        else:
            typer.echo(
                "nothing was printed on its console since it was started or copied", err=True
            )


def _console(client: Sandyard, reference: str) -> str:
    # What is kept may begin and end within a character.
    return client.logs(reference).replace("\r", "").strip("\ufffd")


def _print_console(text: str, *, raw: bool) -> None:
    write_raw(sys.stdout, (text if raw else plain(text)).encode(), raw=raw)


def _follow_console(client: Sandyard, reference: str, *, raw: bool) -> None:
    shown = ""
    while True:
        now = _console(client, reference)
        _print_console(appended(shown, now), raw=raw)
        shown = now
        time.sleep(_LOOK_S)


def appended(before: str, now: str) -> str:
    """Return what was added to a log of which only the end is kept: all of it if the two have
    nothing in common."""
    for length in range(min(len(before), len(now)), 0, -1):
        if before.endswith(now[:length]):
            return now[length:]
    return now


@app.command()
def fork(
    reference: Reference,
    count: Annotated[int, typer.Option(help="How many, 1 to 100.")] = 1,
    name: Annotated[
        str | None, typer.Option(help="A name. With several forks, a number is appended.")
    ] = None,
    wait: Annotated[int, typer.Option(help="Seconds to wait until they are running.")] = 60,
    as_json: Json = False,
) -> None:
    """Create sandboxes from the current state of this one: files, memory and processes."""
    with open_client() as client:
        until = time.monotonic() + wait
        made = client.fork(reference, count, name=name)
        for one in made:
            with suppress(NotReadyError):  # what became of it is shown
                one.wait_until_ready(until - time.monotonic())
    if as_json:
        show_json([dict(one.raw) for one in made])
    else:
        _show(made)
    if any(one.status in _BROKEN for one in made):
        raise typer.Exit(1)


@app.command()
def rollback(
    reference: Reference,
    snapshot: Annotated[str, typer.Argument(help="One of its snapshots, by id or name.")],
) -> None:
    """Restore a sandbox to one of its snapshots. Its current state is lost."""
    with open_client() as client:
        client.roll_back(reference, snapshot)
    typer.echo(f"{reference} is as it was in {snapshot}")


@app.command("destroy", hidden=True)
@app.command()
def delete(references: References, as_json: Json = False) -> None:
    """Delete sandboxes and wait until they are gone."""
    with open_client() as client:

        def delete_one(reference: str) -> str:
            client.delete(reference)
            return f"deleted {reference}"

        for_each(references, delete_one, as_json=as_json)
