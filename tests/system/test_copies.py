"""Templates and versions that one node built, and that every node starts."""

from pathlib import Path

import pytest
from tests.support.lab import Host, Lab, lab
from tests.support.server import QEMU, wait_until

pytestmark = [pytest.mark.machine]


def build(made: Lab, slug: str, **body: object) -> None:
    """Build a version of a template."""
    made.ask("POST", "/v1/templates", slug=slug, **body)
    wait_until(
        lambda: made.ask("GET", f"/v1/templates/{slug}")["status"] != "building",
        limit_s=240, what=f"{slug} is built",
    )  # fmt: skip
    (one,) = made.ask("GET", f"/v1/templates/{slug}/builds")
    assert one["status"] == "ready", one["error"]


def versions(host: Host) -> list[Path]:
    return sorted((host.home / "versions").glob("[!.]*/root.erofs"))


def test_what_one_node_built_starts_on_every_node() -> None:
    with lab() as made:
        made.add_node("first", is_real=True, **QEMU, SANDYARD_POOL__CEILING="0")
        made.until_up()
        for name in ("second", "third"):
            made.add_node(name, is_real=True, builds="", **QEMU, SANDYARD_POOL__CEILING="0")
        others = [made.nodes["second"], made.nodes["third"]]
        made.until_up()
        for host in others:
            state = host.home / "templates" / "base-minimal.json"
            wait_until(state.exists, limit_s=60, what=f"{host.name} has a copy")
            assert '"copied"' in state.read_text()

        made.drain({"second", "third"})
        build(made, "ours", base="base-minimal", run=["echo made > /made"])
        made.drain(set())
        for host in others:
            wait_until(
                lambda host=host: len(versions(host)) == 1,  # type: ignore[misc]
                limit_s=60, what=f"{host.name} has the version",
            )  # fmt: skip
        # Creating on one node drains the others, and a node that is drained receives no copies.
        for host in others:
            box = made.on(host.name, template="ours")
            assert made.nodes_of([box]) == {host.name}
            assert made.execute(box, "cat /made; id -u").split() == ["made", "0"]
            made.delete(box)
        (first,) = versions(made.nodes["first"])
        for host in others:
            (copy,) = versions(host)
            assert copy.read_bytes() == first.read_bytes()
            # Zeros take no space in the copy either.
            assert copy.stat().st_blocks <= first.stat().st_blocks + 64

        made.client.delete("/v1/templates/ours").raise_for_status()
        for host in made.nodes.values():
            wait_until(
                lambda host=host: versions(host) == [],  # type: ignore[misc]
                limit_s=180, what=f"{host.name} has removed it",
            )  # fmt: skip
            assert list((host.home / "versions").glob(".part-*")) == []
