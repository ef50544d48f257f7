"""Prometheus metrics, and access to them."""

import asyncio
import hmac
import ipaddress
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

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

from sandyard.server.core.contracts.node import MachineFact, NodeControl, NodeReport, Phase, Way
from sandyard.server.core.errors import NotFoundError, UnavailableError
from sandyard.server.service.nodes import Nodes

_FORWARDING = ("forwarded", "via", "x-real-ip")
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


_SILENT = "silent"
_UNREPORTED = (Phase.WAITING, Phase.HELD)
_STATES = (*(phase.value for phase in Phase if phase not in _UNREPORTED), _SILENT)


class Metrics:
    """The metrics of one process."""

    def __init__(self, *, version: str) -> None:
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
            "Machines on this node, by what the node knows of them.",
            ("state",),
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
        shelf = ("template", "vcpus", "memory_mib", "disk_mib")
        self._pool = Gauge(
            "sandyard_pool_size", "Machines that wait.", shelf, registry=self._registry
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
            "sandyard_goldens", "Golden machines at hand.", registry=self._registry
        )
        self._nodes = Gauge(
            "sandyard_nodes",
            "Nodes, by whether they answer.",
            ("state",),
            registry=self._registry,
        )
        info = Gauge("sandyard_info", "This version.", ("version",), registry=self._registry)
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
        self._asked.labels(template, "hit" if is_hit else "miss").inc()

    def nodes(self, *, answering: int, silent: int) -> None:
        """Set how many nodes answer, and how many do not."""
        self._nodes.labels("answering").set(answering)
        self._nodes.labels("silent").set(silent)

    def render(self, reports: Sequence[NodeReport]) -> bytes:
        """Return all metrics in Prometheus's text format, including what the nodes report."""
        tally = Tally(_state_of(fact) for report in reports for fact in report.machines)
        for state in _STATES:
            self._machines.labels(state).set(tally[state])
        self._pool.clear()
        self._pool_target.clear()
        self._pool_failures.clear()
        for one in (shelf for report in reports for shelf in report.shelves):
            labels = (one.template, str(one.vcpus), str(one.memory_mib), str(one.disk_mib))
            self._pool.labels(*labels).inc(one.size)
            self._pool_target.labels(*labels).inc(one.target)
            self._pool_failures.labels(*labels).inc(one.failures)
        self._goldens.set(sum(report.goldens for report in reports))
        return generate_latest(self._registry)


def _state_of(fact: MachineFact) -> str:
    return _SILENT if fact.is_silent else fact.phase.value


Reports = Callable[[], Awaitable[Sequence[NodeReport]]]
"""Returns what nodes report now."""


def reports_of(nodes: Nodes, metrics: Metrics) -> Reports:
    """Return a function that polls all nodes, and counts in `metrics` how many answer."""

    async def report_of(node: NodeControl) -> NodeReport | None:
        with suppress(UnavailableError):
            return await nodes.report_of(node)
        return None

    async def reports() -> Sequence[NodeReport]:
        every = nodes.all()
        there = [one for one in every if nodes.is_there(one.node_id)]
        # Concurrently: one after another, silent nodes would take too long.
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(report_of(one)) for one in there]
        found = [report for one in asking if (report := one.result()) is not None]
        metrics.nodes(answering=len(found), silent=len(every) - len(found))
        return found

    return reports


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
