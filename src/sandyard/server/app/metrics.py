"""Prometheus metrics, and access to them."""

import asyncio
import hmac
import ipaddress
import math
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response

from sandyard.build import build_version
from sandyard.server.app.backups import age_of_newest
from sandyard.server.app.certificates import Certificate, certificates_of
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import MachineFact, NodeControl, NodeReport, Phase, Way
from sandyard.server.core.errors import NotFoundError, UnavailableError
from sandyard.server.core.records import JoinedNode
from sandyard.server.service.nodes import Nodes

_FORWARDING = ("forwarded", "via", "x-real-ip")
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


_SILENT = "silent"
_UNREPORTED = (Phase.WAITING, Phase.HELD)
_STATES = (*(phase.value for phase in Phase if phase not in _UNREPORTED), _SILENT)


@dataclass(frozen=True)
class Reported:
    """What a node reported, and how many seconds ago; `joined` is what is known of it if it is on
    another host."""

    report: NodeReport
    age_s: float = 0.0
    joined: JoinedNode | None = None


class Metrics:
    """The metrics of one process."""

    def __init__(
        self,
        *,
        version: str,
        backups: Path | None = None,
        certificates: Callable[[], Iterable[Certificate]] = tuple,
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = Counter(
            "sandyard_http_requests_total",
            "Requests that were answered.",
            ("face", "method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "sandyard_http_request_seconds",
            "How long requests took.",
            ("face", "method", "route"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._machines = Gauge(
            "sandyard_machines",
            "Machines of each node, by what the node knows of them.",
            ("node", "state"),
            registry=self._registry,
        )
        self._starts = Histogram(
            "sandyard_machine_start_seconds",
            "How long machines took to come up, by how they did.",
            ("way",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        for way in Way:
            self._starts.labels(way.value)
        self._asked = Counter(
            "sandyard_pool_requests_total",
            "Starts that could have come from the pool, and whether they did.",
            ("template", "result"),
            registry=self._registry,
        )
        shelf = ("node", "template", "vcpus", "memory_mib", "disk_mib")
        self._pool = Gauge(
            "sandyard_pool_size", "Machines that wait.", shelf, registry=self._registry
        )
        self._pool_versions = Gauge(
            "sandyard_pool_versions",
            "Machines of organizations' templates that wait.",
            ("node",),
            registry=self._registry,
        )
        self._pool_target = Gauge(
            "sandyard_pool_target",
            "How many machines should wait.",
            shelf,
            registry=self._registry,
        )
        self._pool_failures = Gauge(
            "sandyard_pool_failures",
            "How often in a row a machine could not be made ahead; 0 after one that could.",
            shelf,
            registry=self._registry,
        )
        self._goldens = Gauge(
            "sandyard_goldens", "Golden machines at hand.", ("node",), registry=self._registry
        )
        self._ages = Gauge(
            "sandyard_node_report_age_seconds",
            "How long ago a node reported what is shown of it; 0 if it answers now.",
            ("node",),
            registry=self._registry,
        )
        self._joined = Gauge(
            "sandyard_node_info",
            "A node on another host, with its name and version.",
            ("node", "name", "version"),
            registry=self._registry,
        )
        self._nodes = Gauge(
            "sandyard_nodes",
            "Nodes, by whether they answer.",
            ("state",),
            registry=self._registry,
        )
        self._certificates = certificates
        self._expiries = Gauge(
            "sandyard_certificate_expiry_timestamp_seconds",
            "Until when a certificate on this host is valid, in seconds since 1970.",
            ("certificate",),
            registry=self._registry,
        )
        self._backups = backups
        if backups is not None:
            age = Gauge(
                "sandyard_backup_age_seconds",
                "The age of the newest backup made by the server; infinite if there is none.",
                registry=self._registry,
            )
            age.set_function(self._backup_age)
        info = Gauge(
            "sandyard_info",
            "This version, with a hash of its code.",
            ("version",),
            registry=self._registry,
        )
        info.labels(version).set(1)

    def observe(self, *, face: str, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(face, method, route, str(status)).inc()
        self._seconds.labels(face, method, route).observe(seconds)

    def started(self, way: Way, seconds: float) -> None:
        """Count a started machine."""
        self._starts.labels(way.value).observe(seconds)

    def asked_pool(self, *, template: str, is_hit: bool) -> None:
        """Count a start that the pool could have served."""
        # Of versions that users build there may be any number.
        name = "own" if "@" in template else template
        self._asked.labels(name, "hit" if is_hit else "miss").inc()

    def _backup_age(self) -> float:
        try:
            age = None if self._backups is None else age_of_newest(self._backups, datetime.now(UTC))
        except OSError:
            return math.nan
        return math.inf if age is None else age

    def nodes(self, *, answering: int, silent: int) -> None:
        """Set how many nodes answer, and how many do not."""
        self._nodes.labels("answering").set(answering)
        self._nodes.labels("silent").set(silent)

    def render(self, reported: Sequence[Reported]) -> bytes:
        """Return all metrics in Prometheus's text format, including what the nodes report."""
        of_nodes = (
            self._machines, self._pool, self._pool_versions, self._pool_target,
            self._pool_failures, self._goldens, self._ages, self._joined,
        )  # fmt: skip
        for gauge in of_nodes:
            gauge.clear()
        for one in reported:
            node_id = one.report.node_id
            self._ages.labels(node_id).set(one.age_s)
            if one.joined is not None:
                self._joined.labels(node_id, one.joined.name, one.joined.version).set(1)
            self._goldens.labels(node_id).set(one.report.goldens)
            tally = Tally(_state_of(fact) for fact in one.report.machines)
            for state in _STATES:
                self._machines.labels(node_id, state).set(tally[state])
            versions = (shelf.size for shelf in one.report.shelves if "@" in shelf.template)
            self._pool_versions.labels(node_id).set(sum(versions))
            for shelf in one.report.shelves:
                shape = (str(shelf.vcpus), str(shelf.memory_mib), str(shelf.disk_mib))
                if "@" in shelf.template:  # there may be any number
                    continue
                labels = (node_id, shelf.template, *shape)
                self._pool.labels(*labels).set(shelf.size)
                self._pool_target.labels(*labels).set(shelf.target)
                self._pool_failures.labels(*labels).set(shelf.failures)
        for certificate in self._certificates():
            self._expiries.labels(certificate.name).set(certificate.expires_at.timestamp())
        return generate_latest(self._registry)


def metrics_of(settings: Settings) -> Metrics:
    """Return the metrics of a process with these settings."""
    certificates = partial(certificates_of, settings)
    return Metrics(
        version=build_version(), backups=settings.backup.folder, certificates=certificates
    )


def _state_of(fact: MachineFact) -> str:
    return _SILENT if fact.is_silent else fact.phase.value


Reports = Callable[[], Awaitable[Sequence[Reported]]]
"""Returns what nodes report now, or reported last."""


class NodeReports:
    """Polls all nodes, and counts in `metrics` how many answer. Of those that do not, the last
    report is shown, until they are forgotten."""

    def __init__(self, nodes: Nodes, metrics: Metrics, clock: Clock) -> None:
        self._nodes = nodes
        self._metrics = metrics
        self._clock = clock
        self._last: dict[str, tuple[float, NodeReport]] = {}

    async def __call__(self) -> Sequence[Reported]:
        """See `Reports`."""
        every = {one.node_id: one for one in self._nodes.all()}
        there = [one for node_id, one in every.items() if self._nodes.is_there(node_id)]
        # Concurrently: one after another, silent nodes would take too long.
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(self._report_of(one)) for one in there]
        found = [report for one in asking if (report := one.result()) is not None]
        self._metrics.nodes(answering=len(found), silent=len(every) - len(found))
        now = self._clock.monotonic()
        known = {one: reported for one, reported in self._last.items() if one in every}
        self._last = known | {one.node_id: (now, one) for one in found}
        return [
            Reported(report, now - at, self._nodes.joined(report.node_id))
            for at, report in self._last.values()
        ]

    async def _report_of(self, node: NodeControl) -> NodeReport | None:
        with suppress(UnavailableError):
            return await self._nodes.report_of(node)
        return None


class MetricsRoute:
    """Answers GET /metrics, to loopback only or to clients with the token."""

    def __init__(self, metrics: Metrics, reports: Reports, token: SecretStr | None) -> None:
        self._metrics = metrics
        self._reports = reports
        self._token = token

    async def answer(self, request: Request) -> Response:
        """Return the metrics.

        Raises:
            NotFoundError: the client may not read them.
        """
        if not self._may_read(request):
            raise NotFoundError("cannot find /metrics: see /docs for the routes")
        rendered = self._metrics.render(await self._reports())
        return Response(rendered, media_type=CONTENT_TYPE_LATEST)

    def _may_read(self, request: Request) -> bool:
        if self._token is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            return hmac.compare_digest(given.encode(), self._token.get_secret_value().encode())
        # Behind a proxy every client seems to be on loopback, so one that forwards is refused.
        forwards = any(
            name in _FORWARDING or name.startswith("x-forwarded") for name in request.headers
        )
        if forwards or request.client is None:
            return False
        try:
            return ipaddress.ip_address(request.client.host).is_loopback
        except ValueError:
            return False
