"""Pure parts of the node: rules, definitions, command lines, records."""

import asyncio
import errno
import fcntl
import gzip
import ipaddress
import json
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.nodes import a_wish

from sandyard.server.app.member import place_of
from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.errors import InternalError, InvalidArgumentError, UnavailableError
from sandyard.server.core.ids import new_sandbox_id
from sandyard.server.core.ops import Done, SetUp, Wake
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import End, MachineSpec, Place, ProbeSpec, Verdict
from sandyard.server.drivers.kvm import NO_KVM, can_open
from sandyard.server.drivers.processes import (
    DetachedProcess,
    boot_id,
    kill_all_of,
    start_time,
    strangers,
    uids_at_work,
)
from sandyard.server.drivers.programs import output_of
from sandyard.server.drivers.qemu import QemuDriver
from sandyard.server.drivers.qemu.command import (
    confined,
    kernel_command_line,
    machine_arguments,
    machine_memory_mib,
    translated_mib,
    unprivileged,
)
from sandyard.server.drivers.qemu.kvm import Door, door
from sandyard.server.drivers.qemu.memory import load_pages
from sandyard.server.drivers.sparse import copy_sparse, make_empty, merge_sparse
from sandyard.server.links.local import SystemClock
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.host.firewall import exceptions_to_remove, forward_exceptions, slot_rules
from sandyard.server.node.host.identity import Identity, give_back_identity, take_identity
from sandyard.server.node.host.network import check_accounts
from sandyard.server.node.images import workshop
from sandyard.server.node.images.definitions import load_definition, load_definitions
from sandyard.server.node.images.image import Image, write_manifest
from sandyard.server.node.images.initrd import add_modules, make_initrd
from sandyard.server.node.machines.console import FailedConsoles, append_console
from sandyard.server.node.machines.guest import Guest, Was
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.records import Record, Records
from sandyard.server.node.machines.watch import Pulse, watch
from sandyard.server.node.stock.pool import floor_of, pause_after
from sandyard.server.tasks import to_the_end

TEMPLATES = Path(__file__).parents[2] / "templates"
SPEC = MachineSpec(
    name="sandbox-abcdefghijkl",
    vcpus=2,
    memory_mib=512,
    kernel=Path("/i/vmlinuz"),
    initrd=Path("/i/initrd"),
    roots=(Path("/i/a,b.erofs"), Path("/i/root.erofs")),
    disk=Path("/m/disk.ext4"),
    memory=Path("/m/memory"),
    folder=Path("/m/run"),
    place=Place(3, "syd-12ab-3", "tap0", "02:00:00:00:00:02", "10.200.0.14", 1_900_000_003),
    token="a-secret-token",
)


@pytest.mark.parametrize("asked", [128, 256, 1024, 2000, 2032, 2040, 2048, 4096, 65536])
def test_a_machine_never_gets_exactly_two_gigabytes(asked: int) -> None:
    assert machine_memory_mib(asked) >= asked
    assert machine_memory_mib(asked) != 2048


@pytest.mark.parametrize(
    ("memory", "kept"), [(128, 128), (512, 128), (516, 129), (768, 192), (1024, 256), (65536, 256)]
)
def test_a_machine_keeps_translated_code_by_its_memory(memory: int, kept: int) -> None:
    assert translated_mib(memory) == kept


def test_the_token_and_env_are_nowhere_on_the_command_line() -> None:
    arguments = machine_arguments(
        SPEC, door=None, tb_size_mib=64, tsc_khz=1_000, tap_fd=9, is_restored=False
    )
    assert not any("token" in one for one in arguments)
    assert "file=/i/a,,b.erofs" in " ".join(arguments)


def test_only_the_last_disk_can_be_written() -> None:
    arguments = machine_arguments(
        SPEC, door=None, tb_size_mib=64, tsc_khz=1_000, tap_fd=9, is_restored=False
    )
    drives = [arguments[at + 1] for at, word in enumerate(arguments) if word == "-drive"]
    assert ["file=/m/disk.ext4" in one for one in drives] == [False, False, True]
    assert ["readonly=on" in one for one in drives] == [True, True, False]


def test_qemu_runs_with_nothing_it_could_misuse() -> None:
    command = confined("qemu", ["-x"], SPEC, group=None, mounts=None)
    for needed in ("--no-new-privs", "--bounding-set=-all", "--clear-groups", "1900000003"):
        assert needed in command
    assert "--net=/run/netns/syd-12ab-3" in command
    arguments = machine_arguments(
        SPEC, door=Door(), tb_size_mib=64, tsc_khz=None, tap_fd=9, is_restored=True
    )
    assert "spawn=deny" in arguments[arguments.index("-sandbox") + 1]


def test_only_emulated_machines_are_told_the_rate_of_the_counter() -> None:
    assert "tsc_early_khz=42" in kernel_command_line(tsc_khz=42)
    assert "tsc" not in kernel_command_line(tsc_khz=None)


def test_shipped_definitions_can_be_read() -> None:
    found = load_definitions(TEMPLATES)
    shown = {slug for slug, one in found.items() if not one.is_hidden}
    assert shown == {
        "base-ubuntu", "base-minimal", "desktop-ubuntu", "docker-ubuntu", "e2b-base",
        "code-interpreter",
    }  # fmt: skip
    assert set(found) - shown == {"builder"}
    assert [one.slug for one in found.values() if one.kind == "desktop"] == ["desktop-ubuntu"]
    started = {"code-interpreter", "desktop-ubuntu", "docker-ubuntu"}
    assert {one.slug for one in found.values() if one.start} == started
    package = "/usr/lib/python3/dist-packages/code_interpreter"
    files = {name: one.read_bytes() for name, one in found["code-interpreter"].files.items()}
    assert b"def main" in files[f"{package}/server.py"]
    assert b"session" in files[f"{package}/interpreter.js"]
    assert b"eval" in files[f"{package}/interpreter.sh"]
    assert not [name for name in files if "__pycache__" in name]
    assert found["base-ubuntu"].defaults == Shape(2, 4096, 10240)
    assert found["base-minimal"].defaults == Shape(1, 512, 5120)
    assert [source.family for source in found["base-ubuntu"].sources] == ["ubuntu", "debian"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('kind = "headless"', 'kind = "odd"'),
        ('slug = "base-minimal"', 'slug = "../x"'),
        ('memory = "512MB"', "memory = 512"),
        ('name = "Minimal"', 'name = "Minimal"\nsurprise = 1'),
        ("[defaults]", "[defaults"),
        ('family = "debian"', 'family = "slackware"'),
    ],
)
def test_a_definition_that_is_wrong_is_refused_by_name(tmp_path: Path, old: str, new: str) -> None:
    text = (TEMPLATES / "base-minimal.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InvalidArgumentError, match=r"mine\.toml"):
        load_definition(path)


@pytest.fixture
def extending(tmp_path: Path) -> Path:
    """A template that extends base-minimal, with a step and a shape of its own."""
    (tmp_path / "base-minimal.toml").write_text((TEMPLATES / "base-minimal.toml").read_text())
    path = tmp_path / "mine.toml"
    path.write_text(
        'slug = "mine"\nname = "Mine"\nextends = "base-minimal"\npackages = ["jq"]\n'
        'steps = ["true"]\n[defaults]\nvcpus = 2\nmemory = "1GB"\ndisk = "7GB"\n'
    )
    return path


def test_a_template_adds_to_the_one_that_it_extends(extending: Path) -> None:
    base = load_definition(extending.with_name("base-minimal.toml"))
    mine = load_definition(extending)
    assert (mine.slug, mine.name, mine.description) == ("mine", "Mine", base.description)
    assert mine.packages == (*base.packages, "jq")
    assert (mine.steps, mine.warmup, mine.sources) == (("true",), base.warmup, base.sources)
    assert mine.defaults == Shape(2, 1024, 7168)


def test_a_template_changes_with_the_one_that_it_extends(extending: Path) -> None:
    base, before = extending.with_name("base-minimal.toml"), load_definition(extending)
    base.write_text(base.read_text().replace('"bash"', '"bash", "jq"'))
    after = load_definition(extending)
    assert after.digest != before.digest
    assert after.packages_digest != before.packages_digest
    # Which kernel is used says nothing of the packages.
    for path in (base, extending):
        path.write_text('kernel_arguments = "quiet"\n' + path.read_text())
    assert load_definition(extending).packages_digest == after.packages_digest
    assert load_definition(extending).digest != after.digest


def test_a_template_adds_files_and_changes_with_them(extending: Path) -> None:
    folder = extending.parent
    extending.write_text(
        extending.read_text() + '[files]\n"/opt/one" = "one"\n"/opt/all" = "folder"\n'
    )
    with pytest.raises(InvalidArgumentError, match="one"):
        load_definition(extending)
    (folder / "folder" / "deep").mkdir(parents=True)
    for name in ("one", "folder/two", "folder/deep/three"):
        (folder / name).write_text(name)
    found = load_definition(extending)
    assert found.files == {
        "/opt/one": folder / "one", "/opt/all/two": folder / "folder/two",
        "/opt/all/deep/three": folder / "folder/deep/three",
    }  # fmt: skip
    (folder / "folder/two").write_text("other")
    changed = load_definition(extending)
    assert (changed.digest == found.digest, changed.packages_digest) == (
        False, found.packages_digest,
    )  # fmt: skip
    (folder / "folder/two").rename(folder / "folder/moved")
    assert load_definition(extending).digest != changed.digest


@pytest.mark.parametrize(
    "words",
    [
        'files = {"relative" = "one"}', 'files = {"/a/../../b" = "one"}', 'files = ["one"]',
        'files = {"/a" = 5}', 'wheels = ["name"]', 'wheels = ["name==1"]', 'wheels = "name==1"',
        'wheels = ["name==1 --hash=sha256:00"]', 'wheels = ["-e . --hash=sha256:00"]',
    ],
)  # fmt: skip
def test_files_and_wheels_that_cannot_be_used_are_refused(extending: Path, words: str) -> None:
    extending.write_text(f"{words}\n{extending.read_text()}")
    (extending.parent / "one").touch()
    with pytest.raises(InvalidArgumentError, match=r"mine\.toml"):
        load_definition(extending)


@pytest.mark.parametrize("extended", ["absent", "mine", "../base-minimal", ""])
def test_a_template_extends_one_of_its_folder_that_stands_alone(
    extending: Path, extended: str
) -> None:
    extending.write_text(extending.read_text().replace('"base-minimal"', f'"{extended}"'))
    with pytest.raises(InvalidArgumentError, match=r"mine\.toml"):
        load_definition(extending)


def test_an_image_of_an_earlier_version_has_all_in_one(tmp_path: Path) -> None:
    write_manifest(tmp_path, os="o", size_bytes=1, inputs={})
    image = Image("d", tmp_path, "o", 1, datetime.now(UTC), {})
    assert [one.name for one in image.roots] == ["tools.erofs", "root.erofs"]
    (tmp_path / "base.ext4").touch()
    assert [one.name for one in image.roots] == ["base.ext4"]


def test_the_digest_of_a_definition_follows_its_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((TEMPLATES / "base-minimal.toml").read_text())
    before = load_definition(path).digest
    path.write_text(path.read_text() + "\n# other\n")
    assert load_definition(path).digest != before


def docker_ruleset(*, comment: str | None = None, with_user_chain: bool = True) -> object:
    def chain(name: str, **more: object) -> dict[str, object]:
        return {"chain": {"family": "ip", "table": "filter", "name": name, **more}}

    entries = [chain("FORWARD", hook="forward", policy="drop")]
    if with_user_chain:
        entries.append(chain("DOCKER-USER"))
    if comment:
        rule = {"family": "ip", "table": "filter", "chain": "DOCKER-USER", "handle": 7}
        entries.append({"rule": {**rule, "comment": comment}})
    return {"nftables": entries}


def test_dockers_drop_gets_an_exception_where_docker_wants_it() -> None:
    rules = forward_exceptions(docker_ruleset(), prefix="syd-12ab", table="sandyard_12ab")
    assert rules.count("insert rule ip filter DOCKER-USER") == 2
    plain = docker_ruleset(with_user_chain=False)
    assert "ip filter FORWARD" in forward_exceptions(plain, prefix="syd-12ab", table="t")


def test_an_exception_is_added_once_and_can_be_taken_back() -> None:
    there = docker_ruleset(comment="sandyard_12ab")
    assert forward_exceptions(there, prefix="syd-12ab", table="sandyard_12ab") == ""
    assert "handle 7" in exceptions_to_remove(there, table="sandyard_12ab")
    assert exceptions_to_remove(there, table="sandyard_ffff") == ""
    assert forward_exceptions({"nftables": []}, prefix="sy", table="t") == ""


def test_allowed_networks_come_before_the_private_ones_are_rejected() -> None:
    rules = slot_rules(
        uplink="up0",
        tap="tap0",
        mac="02:73:79:00:00:02",
        outer=ipaddress.IPv4Address("10.200.0.2"),
        agent_port=9111,
        egress_uid=1_900_065_536,
        allow=["10.9.0.0/16"],
    )
    [allowed] = [line for line in rules.splitlines() if "10.9.0.0/16" in line]
    [private] = [line for line in rules.splitlines() if "192.168.0.0/16" in line]
    assert "accept" in allowed
    assert "reject" in private
    assert rules.index(allowed) < rules.index(private)
    assert "tcp dport != 9111" in rules


def test_installations_in_containers_get_accounts_of_their_own(tmp_path: Path) -> None:
    registry, home = tmp_path / "registry", tmp_path / "home"
    first = take_identity(home, routes=[], registry=registry)
    assert take_identity(home, routes=[], registry=registry) == first
    # Another container's home has the same path, and its registry may be this one, or not.
    (home / "instance.json").write_text(json.dumps({"id": "beef", "index": first.index}))
    second = take_identity(home, routes=[], registry=registry)
    assert second.index != first.index
    third = take_identity(
        tmp_path / "third",
        routes=[],
        registry=tmp_path / "other",
        at_work=lambda uids: {uids.start} if uids.start in first.uids else set(),
    )
    assert third.index != first.index


@pytest.mark.root
async def test_processes_of_another_installation_are_found_and_left_alone() -> None:
    identity = Identity(
        "test", 63, ipaddress.IPv4Network("10.99.0.0/20"), 1_900_000_000 + 63 * 1024
    )
    uid = identity.uids.stop - 1
    here, other = Path("/proc/self/ns/net"), Path("/run/netns/none")
    account = ("setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups")
    process = await asyncio.create_subprocess_exec(*account, "sleep", "600")
    try:
        while uid not in uids_at_work(identity.uids):
            await asyncio.sleep(0.01)
        assert strangers(identity.uids, lambda _: here) == []
        assert strangers(identity.uids, lambda _: other) == [process.pid]
        with pytest.raises(UnavailableError, match=str(process.pid)):
            await check_accounts(identity)
        await kill_all_of(uid, other)
        assert process.returncode is None
        await kill_all_of(uid, here)
        assert await process.wait() == -9
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_installations_share_nothing(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    one = take_identity(tmp_path / "one", routes=[], registry=registry)
    two = take_identity(tmp_path / "two", routes=[], registry=registry)
    assert one.id != two.id
    assert not one.subnet.overlaps(two.subnet)
    accounts = [*one.uids, *two.uids, *one.egress_uids, *two.egress_uids]
    assert len(set(accounts)) == len(accounts)
    assert one.table != two.table
    assert take_identity(tmp_path / "one", routes=[one.subnet], registry=registry) == one


def test_a_copy_of_a_home_at_the_same_path_is_another_place(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    home.mkdir()
    copy.mkdir()
    place = place_of(home)
    assert place_of(home) == place
    home.rename(tmp_path / "gone")
    copy.rename(home)
    assert place_of(home) != place


async def test_a_heartbeat_that_fails_in_a_way_nobody_foresaw_is_not_the_last() -> None:
    ended, asked = asyncio.Event(), 0

    class Beaten:
        async def console(self) -> bytes:
            return b""

        async def stall(self) -> None:
            return None

        async def wait(self) -> End:
            await ended.wait()
            return End("machine_died", "it ended")

    class NoThread:
        async def ask(self, operation: object, *, limit_s: float) -> None:
            nonlocal asked
            asked += 1
            if asked == 3:
                ended.set()
            raise RuntimeError("can't start new thread")

    limits = SimpleNamespace(watch_period_s=0.01, heartbeat_s=0.01)
    means = SimpleNamespace(
        clock=SystemClock(), limits=limits, patience=lambda seconds: seconds, on_change=lambda: None
    )
    body = SimpleNamespace(append_console=lambda said: None)
    async with asyncio.timeout(10):
        end = await watch(
            cast("Any", Beaten()), cast("Any", body), Pulse(), cast("Any", means),
            lambda: cast("AgentLink", NoThread()), lambda: None,
        )  # fmt: skip
    assert (end.code, asked >= 3) == ("machine_died", True)


def test_a_place_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "registry"
    one = take_identity(tmp_path / "one", routes=[], registry=registry)

    def is_killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        (tmp_path / "one/instance.json").unlink()
        killed.setattr(os, "fsync", is_killed)
        take_identity(tmp_path / "one", routes=[], registry=registry)
    assert not (tmp_path / "one/instance.json").exists()
    two = take_identity(tmp_path / "two", routes=[], registry=registry)
    with monkeypatch.context() as killed:
        # At a start that changes nothing, nothing is written.
        killed.setattr(os, "fsync", is_killed)
        assert take_identity(tmp_path / "two", routes=[], registry=registry) == two
    assert one.id != two.id


def test_an_index_is_free_again_when_its_home_is_gone(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    one = take_identity(tmp_path / "one", routes=[], registry=registry)
    give_back_identity(tmp_path / "one", registry=registry)
    assert take_identity(tmp_path / "two", routes=[], registry=registry).index == one.index


def test_an_index_is_not_free_while_its_home_is_out_of_sight(tmp_path: Path) -> None:
    registry, home = tmp_path / "registry", tmp_path / "one"
    one = take_identity(home, routes=[], registry=registry)
    shutil.rmtree(home)
    path = registry / f"{one.id}.json"
    claim = json.loads(path.read_text())
    # As where another file system covers the folder that the home is in.
    path.write_text(json.dumps({**claim, "device": claim["device"] + 1}))
    two = take_identity(tmp_path / "two", routes=[], registry=registry)
    assert two.index != one.index
    # No machine has outlived a boot.
    path.write_text(json.dumps({**claim, "device": claim["device"] + 1, "boot": "earlier"}))
    assert take_identity(tmp_path / "three", routes=[], registry=registry).index == one.index


def test_subnets_the_host_routes_to_are_left_alone(tmp_path: Path) -> None:
    taken = ipaddress.IPv4Network("10.200.0.0/16")
    identity = take_identity(tmp_path / "one", routes=[taken], registry=tmp_path / "registry")
    assert not identity.subnet.overlaps(taken)
    everything = [ipaddress.IPv4Network("10.0.0.0/8")]
    with pytest.raises(UnavailableError, match="SANDYARD_NODE__SUBNET"):
        take_identity(tmp_path / "two", routes=everything, registry=tmp_path / "registry")


def test_records_survive_and_strays_are_removed(tmp_path: Path) -> None:
    residents = Records(tmp_path)
    record = Record(
        id="machine-abcdefghijkl", sandbox_id="sandbox-abcdefghijkl", incarnation=2,
        phase=Phase.RUNNING, slot=4, template="t", image="i", driver="d", os="o", vcpus=1,
        memory_mib=512, disk_mib=1024, token="secret", handle={"pid": 1},
    )  # fmt: skip
    residents.write(record)
    (tmp_path / "machine-zzzzzzzzzzzz").mkdir()
    # Written without waiting for the disk, and the host lost its power.
    empty = tmp_path / "machine-yyyyyyyyyyyy" / "resident.json"
    empty.parent.mkdir()
    empty.touch()
    Records(tmp_path).sweep()
    assert Records(tmp_path).all() == [record]
    assert [one.name for one in tmp_path.iterdir()] == [record.id]
    written = tmp_path / record.id / "resident.json"
    assert written.stat().st_mode & 0o777 == 0o600
    residents.remove(record.id)
    assert list(tmp_path.iterdir()) == []


def test_the_console_log_is_bounded_and_keeps_the_end(tmp_path: Path) -> None:
    for number in range(40):
        append_console(tmp_path, b"%02d" % number * 32_768)
    kept = (tmp_path / "console.log").read_bytes()
    assert len(kept) <= 1024 * 1024
    assert kept.endswith(b"39")


def test_a_failed_try_that_printed_nothing_does_not_hide_what_an_earlier_one_told(
    tmp_path: Path,
) -> None:
    consoles = FailedConsoles(tmp_path / "consoles")
    machine = tmp_path / "machine"
    machine.mkdir()
    append_console(machine, b"no such root")
    consoles.keep("sandbox", machine)
    (machine / "console.log").unlink()
    consoles.keep("sandbox", machine)
    assert consoles.find("sandbox") == b"no such root"
    append_console(machine, b"panic")
    consoles.keep("sandbox", machine)
    assert consoles.find("sandbox") == b"panic"


def test_a_recycled_pid_is_not_taken_for_the_machine() -> None:
    pid = os.getpid()
    started = start_time(pid)
    assert started is not None
    found = DetachedProcess.find(pid, started=started, boot=boot_id())
    assert found is not None
    found.close()
    assert DetachedProcess.find(pid, started=started + 1, boot=boot_id()) is None
    assert DetachedProcess.find(pid, started=started, boot="another boot") is None


def test_an_initramfs_needs_its_modules(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/busybox").write_bytes(b"busybox")
    folder = tmp_path / "usr/lib/modules/6.0"
    folder.mkdir(parents=True)
    script = b"#!/bin/sh\n"
    (folder / "modules.builtin").write_text(
        "a/virtio_mmio.ko\na/virtio_blk.ko\na/erofs.ko\na/ext4.ko\n"
    )
    (folder / "modules.dep").write_text("n/virtio_net.ko: n/b.ko n/a.ko\nn/a.ko:\nn/b.ko: n/a.ko\n")
    (folder / "n").mkdir()
    for name in ("virtio_net", "a", "b"):
        (folder / f"n/{name}.ko").write_bytes(name.encode())
    with pytest.raises(InternalError, match="overlay"):
        make_initrd(tmp_path, tmp_path, "6.0", script, tmp_path / "initrd")
    (folder / "modules.builtin").write_text(
        "a/virtio-mmio.ko\na/virtio_blk.ko\na/erofs.ko\na/overlay.ko\na/ext4.ko\n"
    )
    make_initrd(tmp_path, tmp_path, "6.0", script, tmp_path / "initrd")
    archive = (tmp_path / "initrd").read_bytes()
    assert b"a.ko\nb.ko\nvirtio_net.ko\n" in archive
    assert archive.startswith(b"070701")
    assert archive.rstrip(b"\0").endswith(b"TRAILER!!!")
    # A kernel with everything built in has no modules at all.
    make_initrd(tmp_path, tmp_path, None, script, tmp_path / "initrd")
    assert b".ko" not in (tmp_path / "initrd").read_bytes()


def test_what_mounts_need_lies_unpacked_in_the_image(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/modules/6.8"
    (folder / "n").mkdir(parents=True)
    (folder / "modules.builtin").write_text("a/lockd.ko\n")
    (folder / "modules.dep").write_text(
        "n/nfsv4.ko.xz: n/nfs.ko.gz n/sunrpc.ko.zst\nn/nfs.ko.gz: n/sunrpc.ko.zst\n"
        "n/sunrpc.ko.zst:\n"
    )
    (folder / "n/nfsv4.ko.xz").write_bytes(lzma.compress(b"four"))
    (folder / "n/nfs.ko.gz").write_bytes(gzip.compress(b"nfs"))
    packed = subprocess.run(["zstd", "-c"], input=b"rpc", capture_output=True, check=True).stdout
    (folder / "n/sunrpc.ko.zst").write_bytes(packed)
    add_modules(tmp_path, tmp_path, "6.8")
    made = tmp_path / "usr/lib/sandyard/modules"
    order = (made / "order").read_text().split()
    assert order == ["sunrpc.ko", "nfs.ko", "nfsv4.ko"]
    assert [(made / one).read_bytes() for one in order] == [b"rpc", b"nfs", b"four"]
    # A kernel with everything built in, or without any NFS, has nothing to load.
    (folder / "modules.builtin").write_text("a/nfsv4.ko\n")
    for release in ("6.8", None):
        shutil.rmtree(made)
        add_modules(tmp_path, tmp_path, release)
        assert (made / "order").read_text() == ""
    (folder / "modules.builtin").write_text("")
    (folder / "n/nfs.ko.gz").write_bytes(b"no gzip")
    shutil.rmtree(made)
    with pytest.raises(InternalError, match=r"nfs\.ko\.gz cannot be read"):
        add_modules(tmp_path, tmp_path, "6.8")


@pytest.mark.parametrize(
    ("mode", "group", "asked"),
    [(0o660, 992, ["--groups", "992"]), (0o666, 992, ["--clear-groups"]),
     (0o600, 992, ["--clear-groups"]), (0o660, 0, ["--clear-groups"])],
)  # fmt: skip
def test_the_account_comes_to_kvm_by_its_group_or_by_a_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, group: int, asked: list[str]
) -> None:
    device = tmp_path / "kvm"
    device.touch()

    class Found:
        st_mode, st_gid = 0o020000 | mode, group

    monkeypatch.setattr(Path, "stat", lambda *_, **__: Found)
    with door(device) as way:
        told = unprivileged(1, group=way.group)
        assert told[5 : 5 + len(asked)] == asked
        arguments = " ".join(way.arguments)
        by_descriptor = mode == 0o600 or group == 0
        assert ("/dev/fdset/" in arguments) == by_descriptor
        if by_descriptor:
            assert way.fd is not None
            assert f"fd={way.fd}," in arguments
            os.fstat(way.fd)
    if way.fd is not None:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(way.fd)


async def test_that_kvm_is_closed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ProbeSpec(tmp_path, tmp_path, tmp_path, limit_s=1)
    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.can_open", lambda: False)
    verdict = await QemuDriver(accel="kvm", binary="echo").probe(spec)
    assert verdict == Verdict(False, NO_KVM, is_certain=False)


async def test_what_kept_a_probe_from_running_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(arguments: Sequence[str], **_: object) -> bytes:
        if "--version" in arguments:
            return b"QEMU emulator version 10.0"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.output_of", fails)
    monkeypatch.setattr(os, "chown", lambda *_: None)
    verdict = await QemuDriver(accel="tcg").probe(ProbeSpec(tmp_path, tmp_path, tmp_path, 1))
    assert not verdict.is_usable
    assert not verdict.is_certain
    assert "No space left" in verdict.reason


@pytest.mark.parametrize(
    ("accel", "said", "is_certain"), [("kvm", b"", True), ("kvm", b"x", False), ("tcg", b"", False)]
)
async def test_a_kernel_that_kvm_cannot_run_is_not_tried_again_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accel: str, said: bytes, is_certain: bool
) -> None:
    async def hangs(arguments: Sequence[str], **_: object) -> bytes:
        if "--version" in arguments:
            return b"QEMU emulator version 10.0"
        (tmp_path / "console").write_bytes(said)
        raise TimeoutError

    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.can_open", lambda: True)
    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.door", lambda: nullcontext(Door()))
    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.output_of", hangs)
    monkeypatch.setattr(os, "chown", lambda *_: None)
    verdict = await QemuDriver(accel=accel).probe(ProbeSpec(tmp_path, tmp_path, tmp_path, 1))
    assert (verdict.is_usable, verdict.is_certain) == (False, is_certain)
    assert ("under this host's KVM" in verdict.reason) is is_certain


async def test_a_qemu_that_is_too_old_for_a_descriptor_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.can_open", lambda: True)

    async def refuses(arguments: Sequence[str], **_: object) -> bytes:
        if "--version" in arguments:
            return b"QEMU emulator version 7.2"
        raise ChildProcessError("qemu: -accel kvm: Property 'kvm-accel.device' not found")

    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.output_of", refuses)
    monkeypatch.setattr(os, "chown", lambda *_: None)
    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.door", lambda: nullcontext(Door()))
    spec = ProbeSpec(tmp_path, tmp_path, tmp_path, limit_s=1)
    verdict = await QemuDriver(accel="kvm").probe(spec)
    assert not verdict.is_usable
    assert not verdict.is_certain
    assert "chmod 660 /dev/kvm" in verdict.reason


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_probe_that_has_passed_is_not_waited_for_whatever_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    given: list[object] = []

    async def passes(arguments: Sequence[str], **options: object) -> bytes:
        if "--version" in arguments:
            return b"QEMU emulator version 10.0"
        given.append(options["pass_fds"])
        (tmp_path / "console").write_bytes(b"sandyard: probe passed\n")
        if hangs:
            await asyncio.Event().wait()
        raise ChildProcessError("KVM internal error")

    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.can_open", lambda: True)
    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.output_of", passes)
    monkeypatch.setattr(os, "chown", lambda *_: None)
    way = nullcontext(Door(fd=77))
    monkeypatch.setattr("sandyard.server.drivers.qemu.driver.door", lambda: way)
    async with asyncio.timeout(20):
        spec = ProbeSpec(tmp_path, tmp_path, tmp_path, limit_s=1000)
        verdict = await QemuDriver(accel="kvm").probe(spec)
    assert verdict.is_usable
    assert given == [(77,)]


@pytest.mark.parametrize("is_software", [True, False])
def test_a_kvm_of_software_is_not_asked_for_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_software: bool
) -> None:
    monkeypatch.setattr(
        "sandyard.server.drivers.qemu.kvm._SOFTWARE", tmp_path if is_software else tmp_path / "no"
    )
    assert ("arch-capabilities=off" in Door().arguments[-1]) == is_software


async def test_a_program_that_does_not_end_in_time_ends_with_all_that_it_started(
    tmp_path: Path,
) -> None:
    # As `timeout` does with a hypervisor whose guest hangs: the other holds the output open.
    line = f"sleep 1000 & echo $! >{tmp_path}/pid; wait"
    async with asyncio.timeout(60):
        with pytest.raises(TimeoutError):
            await output_of(["sh", "-c", line], limit_s=10)
        other = int((tmp_path / "pid").read_text())
        while start_time(other) is not None:
            await asyncio.sleep(0.01)


def test_a_device_that_is_not_there_cannot_be_opened(tmp_path: Path) -> None:
    assert not can_open(tmp_path / "none")
    (tmp_path / "kvm").touch()
    assert can_open(tmp_path / "kvm")


def test_a_host_without_kvm_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), door(tmp_path / "none"):
        pass


def test_memory_of_a_process_that_has_ended_is_not_written_for_ever(tmp_path: Path) -> None:
    memory, pages = tmp_path / "memory", tmp_path / "pages"
    make_empty(memory, 1)
    pages.write_bytes(b"")
    with pytest.raises((InternalError, FileNotFoundError)):
        load_pages(2**22 + 1, memory, pages)


async def test_what_is_done_to_the_end_is_waited_for_by_those_who_break_it_off() -> None:
    done = asyncio.Event()
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()
        done.set()

    task = asyncio.ensure_future(to_the_end(work()))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


def test_files_with_holes_are_copied_to_other_file_systems_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"begin")
        file.seek(5 * 2**20)
        file.write(b"end" * 700_000)
        file.truncate(20 * 2**20)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        for target in (tmp_path / "copy", Path(elsewhere) / "copy"):
            copy_sparse(source, target)
            assert target.read_bytes() == source.read_bytes()
            assert target.stat().st_blocks < 10 * 2**20 // 512


def test_a_file_is_laid_over_another_where_it_has_data(tmp_path: Path) -> None:
    under, over, target = (tmp_path / name for name in ("under", "over", "target"))
    under.write_bytes(b"u" * 2**20)
    make_empty(over, 1)
    over.chmod(0o600)
    with over.open("r+b") as file:
        file.seek(8192)
        file.write(b"o" * 4096)
    merge_sparse(under, over, target)
    expected = b"u" * 8192 + b"o" * 4096
    assert target.read_bytes() == expected.ljust(2**20, b"u")


class LateLink:
    """A link on which each message takes as long as it is told, and then no time at all."""

    def __init__(self, *delays_s: float) -> None:
        self.delays_s = list(delays_s)
        self.now_s = 0.0
        self.set_by_s = 0.0
        self.was_set = 0
        self.late_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.now_s + self.set_by_s, UTC)

    async def ask(self, operation: Wake | SetUp, *, limit_s: float) -> Done:
        self.now_s += self.delays_s.pop(0) if self.delays_s else 0.0
        if operation.wall_ns is not None:
            self.late_s = self.now_s + self.set_by_s - operation.wall_ns / 1e9
            self.was_set += 1
        return Done()

    def use_token(self, token: str) -> None:
        pass


def means_of(link: LateLink) -> SimpleNamespace:
    return SimpleNamespace(
        clock=link, patience=lambda seconds: seconds, drivers=SimpleNamespace(pace=1.0)
    )


@pytest.mark.parametrize("slow", [0, 1, 3, 10])
async def test_the_clock_of_a_machine_made_ahead_is_set_until_it_is_right(slow: int) -> None:
    link = LateLink(*[0.4] * slow)
    guest = Guest(cast("Means", means_of(link)))
    guest.link = cast("AgentLink", link)
    await guest.settle_clock()
    assert link.late_s < 0.001
    assert not link.delays_s


@pytest.mark.parametrize(
    ("waits_s", "set_by_s", "is_set"),
    [(1, 0, 0), (50, 0.01, 0), (61, 0, 1), (1, 3600, 1), (1, -1, 1)],
)
async def test_a_machine_of_the_pool_is_given_out_with_the_clock_right(
    waits_s: float, set_by_s: float, is_set: int
) -> None:
    link = LateLink()
    guest = Guest(cast("Means", means_of(link)))
    guest.link = cast("AgentLink", link)
    await guest.settle_clock()
    link.was_set, link.now_s, link.set_by_s = 0, link.now_s + waits_s, set_by_s
    await guest.set_up(a_wish(new_sandbox_id()), was=Was.UNIQUE, grows=False, limit_s=1)
    assert link.was_set == is_set
    assert link.late_s < 0.001


async def test_a_clock_that_never_gets_right_is_not_set_for_ever() -> None:
    link = LateLink(*[0.4] * 100)
    guest = Guest(cast("Means", means_of(link)))
    guest.link = cast("AgentLink", link)
    await guest.settle_clock()
    assert len(link.delays_s) == 70


@pytest.mark.parametrize(
    ("memory_mib", "free_mib", "cores", "shelves", "wait"),
    [
        (4096, 21_500, 2, 1, 10),  # base-ubuntu on two processors and 24 GB
        (4096, 7_000, 4, 1, 3),  # on a laptop
        (512, 21_500, 2, 1, 10),
        (512, 21_500, 2, 2, 5),
        (4096, 1_000, 2, 1, 1),
        (65_536, 21_500, 2, 3, 1),
        (1, 100, 1, 1, 5),
    ],
)
def test_as_many_wait_as_a_host_has_to_spare(
    memory_mib: int, free_mib: int, cores: int, shelves: int, wait: int
) -> None:
    shape = Shape(2, memory_mib, 10_240)
    assert floor_of(shape, free_mib=free_mib, cores=cores, shelves=shelves) == wait


def test_what_a_killed_builder_left_is_removed_and_what_another_works_in_is_not(
    tmp_path: Path,
) -> None:
    left, other = tmp_path / ".building-left", tmp_path / ".building-other"
    for folder in (left, other):
        (folder / "root/etc").mkdir(parents=True)
    (tmp_path / ".building-link").symlink_to("/etc")
    (tmp_path / "image").mkdir()
    held = os.open(other, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with workshop.workshop(tmp_path, ".building-") as work:
            assert work.is_dir()
            assert not left.exists()
            assert other.exists()
            assert Path("/etc/passwd").exists()
            with workshop.workshop(tmp_path, ".building-") as second:
                assert work.is_dir()
            assert not second.exists()
        assert not work.exists()
        assert (tmp_path / "image").exists()
    finally:
        os.close(held)


def test_a_shelf_that_cannot_be_filled_is_tried_again_after_longer_and_longer() -> None:
    pauses = [pause_after(failures, 60.0) for failures in range(1, 8)]
    assert pauses == [15, 30, 60, 120, 240, 300, 300]
    assert pause_after(10**6, 60.0) == 300
