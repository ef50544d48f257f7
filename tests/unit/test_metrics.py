"""What is told to Prometheus."""

from sandyard.server.app.metrics import Metrics
from sandyard.server.core.contracts.node import NodeReport, ShelfFact


def test_shelves_that_differ_by_their_disks_alone_are_told_apart_and_nodes_added_up() -> None:
    small = ShelfFact("base-ubuntu", 2, 4096, 1024, size=1, target=2)
    usual = ShelfFact("base-ubuntu", 2, 4096, 10240, size=3, target=4, failures=2)
    told = Metrics(version="1").render(
        [NodeReport("a", (), shelves=(small, usual)), NodeReport("b", (), shelves=(usual,))]
    )
    lines = told.decode().splitlines()
    kind = 'template="base-ubuntu",vcpus="2"'
    assert f'sandyard_pool_size{{disk_mib="1024",memory_mib="4096",{kind}}} 1.0' in lines
    assert f'sandyard_pool_size{{disk_mib="10240",memory_mib="4096",{kind}}} 6.0' in lines
    assert f'sandyard_pool_failures{{disk_mib="10240",memory_mib="4096",{kind}}} 4.0' in lines
    assert f'sandyard_pool_target{{disk_mib="10240",memory_mib="4096",{kind}}} 8.0' in lines
