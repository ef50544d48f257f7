"""What is told to Prometheus."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.support.house import settings_of

from sandyard.server.app.member import metrics_host
from sandyard.server.app.metrics import Metrics, Reported
from sandyard.server.core.contracts.node import NodeReport, ShelfFact
from sandyard.server.core.records import JoinedNode

JOINED = JoinedNode("b", "rack 2", datetime(2026, 1, 1, tzinfo=UTC), version="0.1.0+abc")


@pytest.mark.parametrize(
    ("http", "host"),
    [
        ({}, "127.0.0.1"),
        ({"metrics_token": "x" * 32}, "10.0.0.6"),
        ({"metrics_token": "x" * 32, "host": "10.0.0.7"}, "10.0.0.7"),
    ],
)
def test_a_node_shows_metrics_to_other_hosts_if_there_is_a_token(
    http: dict[str, str], host: str, tmp_path: Path
) -> None:
    sections: Any = {"http": http, "cluster": {"host": "10.0.0.6"}}
    assert metrics_host(settings_of(tmp_path, sections=sections)) == host


def test_shelves_are_told_apart_by_node_and_by_disk_alone() -> None:
    small = ShelfFact("base-ubuntu", 2, 4096, 1024, size=1, target=2)
    version = ShelfFact("mine@0", 1, 512, 1024, size=5, target=5)
    usual = ShelfFact("base-ubuntu", 2, 4096, 10240, size=3, target=4, failures=2)
    one, other = (
        Reported(NodeReport("a", (), shelves=(small, usual, version))),
        Reported(NodeReport("b", (), shelves=(usual,)), age_s=7.5, joined=JOINED),
    )
    metrics = Metrics(version="1")
    lines = metrics.render([one, other]).decode().splitlines()
    kind = 'template="base-ubuntu",vcpus="2"'
    for node, disk_mib, size in (("a", 1024, 1), ("a", 10240, 3), ("b", 10240, 3)):
        labels = f'disk_mib="{disk_mib}",memory_mib="4096",node="{node}",{kind}'
        assert f"sandyard_pool_size{{{labels}}} {size:.1f}" in lines
    labels = f'disk_mib="10240",memory_mib="4096",node="b",{kind}'
    assert f"sandyard_pool_failures{{{labels}}} 2.0" in lines
    assert 'sandyard_pool_versions{node="a"} 5.0' in lines
    assert f"sandyard_pool_target{{{labels}}} 4.0" in lines
    assert 'sandyard_node_report_age_seconds{node="b"} 7.5' in lines
    assert 'sandyard_node_info{name="rack 2",node="b",version="0.1.0+abc"} 1.0' in lines
    assert not any(one.startswith('sandyard_node_info{name="a"') for one in lines)
    # A node that was forgotten is shown no longer.
    assert 'node="b"' not in metrics.render([one]).decode()
