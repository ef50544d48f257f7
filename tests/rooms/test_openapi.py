"""The API as it describes itself: every answer is one that it allows, none is a 5xx."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as conformance
from tests.support.house import Yard, open_yard
from tests.support.leftovers import open_things
from tests.support.ports import free_port
from tests.support.stripe import SECRET, WEBHOOK_SECRET, stripe_stand_in

pytestmark = pytest.mark.slow  # thousands of requests: what no one thought of asking


# Whoever may do nothing is refused at the door, whatever else is asked.
_EXAMPLES = {"admin": 12, "reader": 5, "none": 3}


class Served:
    """A house behind a real socket, in a thread of its own, for a client that blocks."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.keys: dict[str, str | None] = {"none": None}
        self._home = home
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._server: uvicorn.Server | None = None

    async def _run(self) -> None:
        with stripe_stand_in(free_port()) as stand_in:
            sections = {
                "accounts": {"failed_logins_per_minute": 1_000_000},
                "billing": {
                    "stripe_secret": SECRET, "stripe_webhook_secret": WEBHOOK_SECRET,
                    "stripe_api": stand_in.url, "sign_up_cents": 10**12,
                },
            }  # fmt: skip
            async with open_yard(self._home, saves=True, sections=sections) as yard:
                await self._serve(yard)

    async def _serve(self, yard: Yard) -> None:
        org_id, user_id = await yard.first()
        self.keys["admin"] = yard.key
        reads = ("sandbox:read", "files:read", "org:read", "activity:read")
        self.keys["reader"] = await yard.add_key(org_id, user_id, scopes=reads)
        config = uvicorn.Config(yard.house.api, port=self.port, log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.01)
            self._ready.set()
            await serving

    def __enter__(self) -> "Served":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    before = open_things()
    with Served(tmp_path_factory.mktemp("api")) as made:
        yield made
    assert not open_things() - before


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> None:
    """The server that these tests share may keep its connections between them."""


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # of the tool's own libraries, not of ours
@pytest.mark.parametrize("who", ["admin", "reader", "none"])
def test_every_answer_is_a_documented_one(served: Served, who: str) -> None:
    base = f"http://127.0.0.1:{served.port}"
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    key = served.keys[who]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    checks = [
        not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]
    tried = 0
    operations: Any = schema.get_all_operations()
    for found in operations:
        tried += _try(found.ok(), base, headers, checks, _EXAMPLES[who])
    assert tried > 50


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # of the tool's own libraries, not of ours
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/secrets"), ("PUT", "/v1/secrets/{name}"),
        ("POST", "/v1/registry-credentials"), ("PUT", "/v1/templates/{slug}/tags/{tag}"),
        ("GET", "/v1/sandboxes/{reference}/processes/{process}/output"),
    ],
)  # fmt: skip
def test_what_the_description_allows_is_not_refused_for_its_form(
    served: Served, method: str, path: str
) -> None:
    base = f"http://127.0.0.1:{served.port}"
    operation: Any = schemathesis.openapi.from_url(f"{base}/openapi.json")[path][method]
    headers, tried = {"Authorization": f"Bearer {served.keys['admin']}"}, 0
    kept = {"name": "KEPT", "value": "x", "hosts": ["example.com"]}
    made = httpx.post(f"{base}/v1/secrets", json=kept, headers=headers)
    assert made.status_code in (201, 409), made.text

    @settings(
        max_examples=20, deadline=None, phases=[Phase.generate], derandomize=True,
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def attempt(case: Any) -> None:
        nonlocal tried
        tried += 1
        case.headers.pop("Idempotency-Key", None)  # a key's second request must be the same
        if method == "PUT" and path == "/v1/secrets/{name}":
            case.path_parameters["name"] = "KEPT"  # one that is there is looked at whole
        response = case.call(base_url=base, headers=headers)
        assert response.status_code in (200, 201, 404, 409), response.text

    attempt()
    assert tried >= 10


def _try(
    operation: Any, base: str, headers: dict[str, str], checks: list[Any], examples: int
) -> int:
    tried = 0

    @settings(
        max_examples=examples, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def attempt(case: Any) -> None:
        nonlocal tried
        tried += 1
        response = case.call(base_url=base, headers=headers)
        # 501 says that something is not built yet, which is no fault of the server.
        is_planned = response.status_code == 501
        wanted = [one for one in checks if not (is_planned and one is not_a_server_error)]
        case.validate_response(response, checks=wanted)

    attempt()
    return tried
