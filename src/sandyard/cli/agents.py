"""`sandyard mcp`: sandboxes for agents that speak the Model Context Protocol."""

import asyncio
import importlib
import socket
from typing import Annotated, Any

import typer


def mcp(
    http: Annotated[
        bool, typer.Option("--http", help="Serve streamable HTTP at /mcp instead of stdio.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --http, the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --http, the port.", min=1, max=65535)] = 8765,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="With --http, another name that it is reached by, such as a proxy's. May be "
            "repeated."
        ),
    ] = None,
) -> None:
    """Serve sandboxes to an agent by MCP: create them, run commands and code, access files.

    By default it speaks MCP over standard input and output. With --http, clients authenticate with
    the API key as a Bearer token. It needs the extra `mcp`.
    """
    try:
        module = importlib.import_module("sandyard.mcp.server")
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"this command needs the extra `mcp` ({error.name} is missing): "
            "pip install 'sandyard[mcp]'"
        ) from error
    asyncio.run(_serve(module, http=http, host=host, port=port, names=allow_host or []))


async def _serve(module: Any, *, http: bool, host: str, port: int, names: list[str]) -> None:
    # No other command needs these.
    from importlib.metadata import version as package_version

    from sandyard.client import AsyncSandyard

    async with AsyncSandyard() as yard:
        server = module.make_server(yard, version=package_version("sandyard"))
        if not http:
            await server.run_stdio_async()
            return
        uvicorn = importlib.import_module("uvicorn")
        known = [module.host_of(one) for one in names]
        if host not in ("0.0.0.0", "::"):  # noqa: S104 - no name that it is reached by
            known.append(module.host_of(host))
        app = module.guarded(module.http_app(server, known), yard.config.api_key)
        config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)
        serving = uvicorn.Server(config)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        with listener:
            typer.echo(f"serving on http://{host}:{port}/mcp", err=True)
            await serving.serve([listener])
