"""The faces of the HTTP listener: the dispatch table, one entry each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import FastAPI

from sandyard.server.api import make_api
from sandyard.server.app.logs import request_id
from sandyard.server.app.metrics import Metrics, MetricsRoute, NodeReports
from sandyard.server.app.settings import E2bSettings, HttpSettings
from sandyard.server.e2b.app import make_e2b
from sandyard.server.front.bodies import LargeBodies
from sandyard.server.front.dispatch import Dispatch, FaceEntry
from sandyard.server.front.face import EdgeServices
from sandyard.server.front.hosts import at_paths, below, named
from sandyard.server.gateway.previews import PreviewApp
from sandyard.server.pages.app import PATHS, PREFIXES, make_pages
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.services import Services

MakeFace = Callable[[Services, EdgeServices], FaceEntry]
"""Makes a face and its entry in the table."""


@dataclass(frozen=True)
class Faces:
    """The standard faces; `front` serves all."""

    front: Dispatch
    api: FastAPI
    previews: PreviewApp


def make_faces(
    services: Services,
    platform: Platform,
    *,
    http: HttpSettings,
    e2b: E2bSettings,
    metrics: Metrics,
    version: str,
    more: Sequence[MakeFace] = (),
) -> Faces:
    """Return all faces. The first entry of the table that matches a request serves it."""
    edge = EdgeServices(
        credentials=services.credentials,
        rates=services.rates,
        observe=metrics.observe,
        bind=request_id.set,
        bodies=LargeBodies(),
    )
    own = named(http.hosts)
    api = make_api(services, edge, version=version, cors_origins=http.cors_origins)
    shown = MetricsRoute(
        metrics, NodeReports(platform.nodes, metrics, platform.clock), http.metrics_token
    )
    api.add_route("/metrics", shown.answer, include_in_schema=False)
    previews = PreviewApp(services, edge, clock=platform.clock)
    pages = make_pages(edge, version=version)
    other = None
    if e2b.enabled:
        other = make_e2b(
            services,
            edge,
            domain=e2b.domain,
            own=own,
            has_public_ports=e2b.public_ports,
            images=e2b.images,
        )
    front = Dispatch(
        [
            *(make(services, edge) for make in more),
            *(other.at_domain if other else ()),
            FaceEntry(below(services.addresses.preview_domain), previews, takes_tunnels=True),
            *(other.beside_others if other else ()),
            FaceEntry(at_paths(own, exactly=PATHS, prefixes=PREFIXES), pages),
            FaceEntry(own, api),
        ]
    )
    return Faces(front, api, previews)
