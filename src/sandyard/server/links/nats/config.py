"""The configuration of an installation's NATS servers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.links.nats.tokens import Key, account_token, operator_token

PAYLOAD_MAX = 8 * 1024 * 1024


@dataclass(frozen=True)
class ServerFiles:
    """The paths of a server's certificate, its key, and the authority's certificate."""

    certificate: Path
    key: Path
    authority: Path


def config_of(
    *,
    installation: str,
    operator: Key,
    account: Key,
    host: str,
    port: int,
    files: ServerFiles | None = None,
    cluster_port: int | None = None,
    routes: Sequence[str] = (),
    name: str = "",
) -> str:
    """Return the configuration of one server; `routes` are the other servers.

    It contains no secrets. Without `files` the server uses no TLS, which is for tests on loopback
    only.
    """
    operator_says = operator_token(operator, installation)
    account_says = account_token(operator, account, installation)
    lines = [
        "# Written by `sandyard admin nats-config`. Nothing in here is secret.",
        *([f"server_name: {_quoted(name)}"] if name else []),
        f"listen: {_quoted(f'{host}:{port}')}",
        f"max_payload: {PAYLOAD_MAX}",
        'write_deadline: "2s"',
        'ping_interval: "1s"',
        "ping_max: 3",
        f"operator: {_quoted(operator_says)}",
        "resolver: MEMORY",
        f"resolver_preload: {{ {account.name}: {_quoted(account_says)} }}",
    ]
    tls: list[str] = []
    if files is not None:
        tls = [
            "{",
            f"    cert_file: {_quoted(str(files.certificate))}",
            f"    key_file: {_quoted(str(files.key))}",
            f"    ca_file: {_quoted(str(files.authority))}",
            '    min_version: "1.3"',
        ]
        lines += ["tls", *tls, "}"]
    if cluster_port is not None:
        lines += [
            "cluster {",
            f"  name: {_quoted(f'sandyard-{installation}')}",
            f"  listen: {_quoted(f'{host}:{cluster_port}')}",
            f"  routes: [{', '.join(_quoted(one) for one in routes)}]",
            *(["  tls", *tls, "    verify: true", "  }"] if tls else []),
            "}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text)
