"""The entry of `sandyard`."""

import os
import sys
from typing import Annotated, NoReturn

import typer

from sandyard.build import build_version
from sandyard.cli import (
    account,
    admin,
    agents,
    backup,
    copy,
    live,
    registry,
    sandbox,
    secret,
    server,
    snapshot,
    template,
    ways,
    workspace,
)
from sandyard.cli.output import show_failure
from sandyard.client import ConnectionFailedError, SandyardError

app = typer.Typer(
    name="sandyard",
    help="Real virtual machines for agents and people.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Boxes are of no use in a pipe, and at 40 columns they cut off the names of options.
    rich_markup_mode=None,
)
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(workspace.app, name="workspace")
app.add_typer(account.auth, name="auth")
app.add_typer(account.ssh_key, name="ssh-key")
app.add_typer(admin.app, name="admin")
app.add_typer(server.nodes, name="node")
app.add_typer(template.app, name="template")
app.add_typer(registry.app, name="registry")
app.add_typer(secret.app, name="secret")
app.add_typer(server.setup, name="setup")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sandyard {build_version()}")
        raise typer.Exit


app.command("cp")(copy.copy)
sandbox.app.command("ssh", context_settings={"allow_interspersed_args": False})(ways.ssh)
sandbox.app.command("url")(ways.url)
app.command("run", context_settings={"allow_interspersed_args": False})(copy.run)
for command in (
    account.login, account.logout, account.usage, live.top, sandbox.logs, sandbox.fork, agents.mcp,
    server.serve, server.control, server.doctor, server.upgrade, server.init, server.stop,
    backup.backup, backup.restore,
):  # fmt: skip
    app.command()(command)


@app.callback()
def _main(
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which saved server and key to use. Default: SANDYARD_PROFILE."
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Real virtual machines for agents and people."""
    if profile is not None:
        os.environ["SANDYARD_PROFILE"] = profile
        for overriding in ("SANDYARD_URL", "SANDYARD_API_KEY"):
            os.environ.pop(overriding, None)


def main() -> None:
    """Run the command line; errors come out as one sentence and exit code 1."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was started with that closed
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(os.dup2(descriptor, number), "w" if number else "r"))
    try:
        app()
    except ConnectionFailedError as error:
        _fail(error, "; is the server running? (scripts/up starts it)")
    except (SandyardError, server.server_errors()) as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except (KeyError, TypeError, IndexError):
        sentence = "the server's answer makes no sense: does SANDYARD_URL lead to Sandyard?"
        _fail(SandyardError(sentence))
    except (OSError, ValueError) as error:  # a file of this computer, say
        _fail(error)


def _fail(error: Exception, hint: str = "") -> NoReturn:
    show_failure(error, hint)
    sys.exit(1)
