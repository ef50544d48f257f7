"""NATS servers of a test's own, with the rights of an installation."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sandyard.server.links.nats.config import config_of
from sandyard.server.links.nats.link import Link
from sandyard.server.links.nats.tokens import (
    Key,
    KeyLogin,
    NatsToken,
    Role,
    control_token,
    node_token,
)
from tests.support.ports import free_port

HOUR = timedelta(hours=1)


@dataclass
class NatsServer:
    """One server, which is started, stopped and hung."""

    folder: Path
    port: int
    operator: Key = field(default_factory=lambda: Key.new(Role.OPERATOR))
    account: Key = field(default_factory=lambda: Key.new(Role.ACCOUNT))
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; skip the test, loudly, where it is not installed."""
        if shutil.which("nats-server") is None:
            pytest.skip("NOT RUN: nats-server is not installed; scripts/test installs it")
        config = self.folder / "nats.conf"
        config.write_text(
            config_of(
                installation="test", operator=self.operator, account=self.account,
                host="127.0.0.1", port=self.port,
            )
        )  # fmt: skip
        with (self.folder / "nats.log").open("ab") as log:
            self.process = subprocess.Popen(["nats-server", "-c", config], stderr=log, stdout=log)

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def hang(self) -> None:
        """Have it stand still."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Have it go on."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def control_link(self, name: str = "one", *, lasts: timedelta = HOUR) -> Link:
        """Return the link of a control plane, not opened."""
        key = Key.new(Role.USER)
        token = control_token(self.account, key.name, name, datetime.now(UTC), lasts)
        return Link((self.url,), name, KeyLogin(key, NatsToken(token)))

    def node_link(self, node_id: str, *, lasts: timedelta = HOUR) -> Link:
        """Return the link of a node, not opened."""
        key = Key.new(Role.USER)
        token = node_token(self.account, key.name, node_id, datetime.now(UTC), lasts)
        return Link((self.url,), node_id, KeyLogin(key, NatsToken(token)))


@contextmanager
def nats_server(folder: Path) -> Iterator[NatsServer]:
    """Yield a server that runs; what it wrote is kept beside its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    server = NatsServer(folder, free_port())
    server.start()
    try:
        yield server
    finally:
        server.kill()
