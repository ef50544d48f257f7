"""`sandyard sandbox ssh` and `url`: into a sandbox with programs that know nothing of Sandyard."""

import os
import re
import shutil
import webbrowser
from dataclasses import replace
from typing import Annotated
from urllib.parse import urlsplit

import typer

from sandyard.cli.output import Json, plain, show_json
from sandyard.cli.sandbox import Reference, open_client, own_words
from sandyard.client import SshAccess
from sandyard.client.config import ClientConfig, config_path

_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}|[0-9A-Fa-f:]{2,39}")
_HOST_KEY = re.compile(r"[a-z0-9@.-]{1,64} [A-Za-z0-9+/=]{16,4096}")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
# Asked for the password of just this login it gives the API key, which the gateway takes for one;
# for all else, a key's passphrase or another host's password, it prompts the user.
_ASK = """#!/bin/sh
case "$1" in
"$SANDYARD_SSH_PROMPT") printf '%s\\n' "$SANDYARD_SSH_PASSWORD" ;;
*)
    exec 3<>/dev/tty || exit 1
    printf '%s' "$1" >&3
    kept=$(stty -g <&3); stty -echo <&3
    IFS= read -r answer <&3
    stty "$kept" <&3; echo >&3
    printf '%s\\n' "$answer" ;;
esac
"""


def ssh(
    reference: Reference,
    command: Annotated[
        list[str] | None, typer.Argument(help="A command. Default: a shell.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option for ssh, such as ForwardAgent=yes."),
    ] = None,
    forward: Annotated[
        list[str] | None,
        typer.Option("--forward", "-L", help="A port to forward, as with ssh: 8000:localhost:80."),
    ] = None,
) -> None:
    """Log in by SSH, with the local ssh program. Uses your SSH key if the sandbox accepts it, else
    the API key."""
    program = shutil.which("ssh")
    if program is None:
        raise typer.BadParameter("there is no ssh on this machine; install openssh-client")
    with open_client() as client:
        where = _reachable(_checked(client.ssh(reference)), client.config)
        config = client.config
    folder = config_path().parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    known, ask = folder / "known_hosts", folder / "ask"
    _know(where)
    ask.write_text(_ASK)
    ask.chmod(0o700)
    words = [
        "ssh", "-p", str(where.port), "-o", f"UserKnownHostsFile={known}",
        "-o", "StrictHostKeyChecking=yes", "-o", "NumberOfPasswordPrompts=1",
        "-o", "PreferredAuthentications=publickey,password",
    ]  # fmt: skip
    for one in option or []:
        words += ["-o", one]
    for one in forward or []:
        words += ["-L", one]
    env = {
        **os.environ,
        "SSH_ASKPASS": str(ask),
        "SSH_ASKPASS_REQUIRE": "force",
        "SANDYARD_SSH_PASSWORD": config.api_key,
        "SANDYARD_SSH_PROMPT": f"{where.user}@{where.host}'s password: ",
    }
    destination = f"{where.user}@{where.host}"
    os.execve(program, [*words, "--", destination, *own_words(command)], env)  # noqa: S606


def _checked(where: SshAccess) -> SshAccess:
    """Return the server's parameters for ssh if they are safe to pass to it."""
    name = where.host if where.port == 22 else f"[{where.host}]:{where.port}"
    is_safe = (
        _USER.fullmatch(where.user)
        and _HOST.fullmatch(where.host)
        and 0 < where.port < 65536
        and _HOST_KEY.fullmatch(where.host_key)
        and where.known_hosts == f"{name} {where.host_key}"
    )
    if not is_safe:
        raise typer.BadParameter(
            f"cannot log in: the server named the destination {plain(where.user)}@"
            f"{plain(where.host)} port {where.port}, or a host key, that ssh must not be given"
        )
    return where


def _reachable(where: SshAccess, config: ClientConfig) -> SshAccess:
    """Return the gateway's address as seen from here: if the server reports loopback, the API's
    host."""
    host = urlsplit(config.url).hostname or where.host
    if where.host not in _LOOPBACK or host in _LOOPBACK:
        return where
    name = host if where.port == 22 else f"[{host}]:{where.port}"
    return replace(where, host=host, known_hosts=f"{name} {where.host_key}")


def _know(where: SshAccess) -> None:
    """Save the gateway's host key, replacing an older one. The key comes from the API, so it is
    trusted."""
    path = config_path().parent / "known_hosts"
    name = where.known_hosts.split(" ", 1)[0]
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        lines = []
    kept = [one for one in lines if one.split(" ", 1)[0] != name]
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("".join(f"{one}\n" for one in [*kept, where.known_hosts]))
    part.replace(path)


def url(
    reference: Reference,
    port: Annotated[int, typer.Argument(help="The port.")],
    open_: Annotated[
        bool,
        typer.Option("--open", help="Open the URL in a browser. Implies --cookie."),
    ] = False,
    cookie: Annotated[
        bool,
        typer.Option("--cookie", help="Use a cookie instead of a token in the host name."),
    ] = False,
    ttl: Annotated[
        int | None,
        typer.Option(
            min=60,
            max=30 * 86_400,
            help="The lifetime in seconds. Default: the server's setting, usually an hour.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a preview URL of a port. Anyone who has the URL can use it."""
    with open_client() as client:
        # DNS and SNI reveal a token in the host name, but not one in the query.
        found = client.url(reference, port, cookie=cookie or open_, ttl=ttl)
    if as_json:
        show_json({"url": found.url, "port": found.port, "expiresAt": found.expires_at})
    else:
        typer.echo(plain(found.url))
    if open_:
        webbrowser.open(found.url)
