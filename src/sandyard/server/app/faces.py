"""The faces of the HTTP listener: the dispatch table, one entry each."""

from collections.abc import Callable, Sequence

from fastapi import FastAPI

from sandyard.server.api import make_api
from sandyard.server.app.metrics import Metrics, MetricsRoute
from sandyard.server.app.settings import HttpSettings
from sandyard.server.front.dispatch import Dispatch, Entry
from sandyard.server.front.face import EdgeServices
from sandyard.server.front.hosts import at_paths, below, named
from sandyard.server.gateway.previews import PreviewApp
from sandyard.server.pages.app import PATHS, PREFIXES, make_pages
from sandyard.server.service.nodes import Nodes
from sandyard.server.service.services import Services

MakeFace = Callable[[Services, EdgeServices], Entry]
"""Makes a face and its entry in the table."""


def make_front(
    services: Services,
    edge: EdgeServices,
    *,
    api: FastAPI,
    previews: PreviewApp,
    http: HttpSettings,
    version: str,
    faces: Sequence[MakeFace] = (),
) -> Dispatch:
    """Return the table of all faces. The first entry that matches a request serves it."""
    own = named(http.hosts)
    pages = make_pages(edge, version=version)
    return Dispatch(
        [
            *(make(services, edge) for make in faces),
            Entry(below(services.addresses.preview_domain), previews, takes_tunnels=True),
            Entry(at_paths(own, exactly=PATHS, prefixes=PREFIXES), pages),
            Entry(own, api),
        ]
    )


def make_runtools_api(
    services: Services,
    edge: EdgeServices,
    *,
    metrics: Metrics,
    nodes: Nodes,
    http: HttpSettings,
    version: str,
) -> FastAPI:
    """Return the application of the RunTools API, with the metrics of the server."""
    api = make_api(services, edge, version=version, cors_origins=http.cors_origins)
    route = MetricsRoute(metrics, nodes, http.metrics_token)
    api.add_route("/metrics", route.answer, include_in_schema=False)
    return api
