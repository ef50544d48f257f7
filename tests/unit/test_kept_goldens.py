"""Golden machines that tests keep for later runs: which are used again, and which are not."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.support import server as servers
from tests.support.server import SERVER, RealServer, kept_goldens


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(servers, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def put(
    folder: Path, name: str, template: str, memory_mib: int = 512, token: str = "1",
    disk_mib: int = 5120,
) -> None:  # fmt: skip
    (folder / name).mkdir(parents=True)
    about = {
        "template": template, "memory_mib": memory_mib, "disk_mib": disk_mib, "token": token,
    }  # fmt: skip
    (folder / name / "manifest.json").write_text(json.dumps({"about": about}))
    (folder / name / "memory").write_bytes(b"memory")


def sharing(*templates: str) -> RealServer:
    made = RealServer(1)
    made.share_goldens(*templates)
    return made


def names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


def test_an_installation_begins_with_those_of_its_templates() -> None:
    put(kept_goldens(), "a", "base-minimal")
    put(kept_goldens(), "b", "base-minimal", 1024)
    put(kept_goldens(), "of another disk", "base-minimal", disk_mib=1024)
    put(kept_goldens(), "c", "base-ubuntu", 4096)
    put(kept_goldens(), "d.part", "base-ubuntu", 4096)
    (kept_goldens() / "e").mkdir()  # it is being removed
    for templates, expected in (((), {"a"}), (("base-ubuntu",), {"a", "c"})):
        made = sharing(*templates)
        assert names(made.home / "goldens") == expected
        shutil.rmtree(made.home)


def test_it_leaves_its_own_and_replaces_what_was_damaged() -> None:
    put(kept_goldens(), "damaged", "base-minimal", token="1")
    put(kept_goldens(), "kept", "base-minimal", token="1")
    made = sharing("base-ubuntu")
    own = made.home / "goldens"
    shutil.rmtree(own / "damaged")
    put(own, "damaged", "base-minimal", token="2")
    put(own, "new", "base-ubuntu", 4096)
    put(own, "not whole.part", "base-ubuntu", 4096)
    put(own, "of a version", "base-ubuntu@1234", 4096)
    made._leave_goldens()
    assert names(kept_goldens()) == {"damaged", "kept", "new"}
    assert '"2"' in (kept_goldens() / "damaged/manifest.json").read_text()
    shutil.rmtree(made.home)


def test_no_more_are_kept_than_two_trees_use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("oldest", "older", "later")):
        put(cache / "goldens" / name, "x", "base-minimal")
        os.utime(cache / "goldens" / name, (number, number))
    monkeypatch.setattr(servers, "_GOLDENS_MAX", 2)
    made = sharing()
    for number in range(4):
        put(made.home / "goldens", f"{number}", "base-minimal", token=f"{number}")
        os.utime(made.home / f"goldens/{number}", (number, number))
    made._leave_goldens()
    assert names(cache / "goldens") == {kept_goldens().name, "later"}
    assert names(kept_goldens()) == {"2", "3"}
    shutil.rmtree(made.home)


@pytest.mark.parametrize("changed", ["guest/agent.py", "drivers/qemu/command.py"])
def test_what_other_code_made_is_not_used(tmp_path: Path, changed: str) -> None:
    copy = tmp_path / "server"
    shutil.copytree(SERVER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert servers._digest_of_code(copy) == servers._digest_of_code()
    servers._digest_of_code.cache_clear()
    (copy / changed).write_text((copy / changed).read_text() + "\n# changed\n")
    assert servers._digest_of_code(copy) != servers._digest_of_code()
