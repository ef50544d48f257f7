"""The SSH gateway, on fake machines, with a client of the same library; OpenSSH's own is in
tests/machine/test_ssh.py."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from tests.support.house import Yard, eventually, open_yard, until

from sandyard.server.app.installation import ssh_host_key
from sandyard.server.core import ops
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.records import ActivityQuery
from sandyard.server.fakes.driver import ECHO_PORT
from sandyard.server.gateway.ssh import gateway as ssh_gateway
from sandyard.server.gateway.ssh.gateway import open_gateway
from sandyard.server.links.local import SystemClock
from sandyard.server.service.people.administration import Administration
from sandyard.server.service.people.organizations import SignUp

SOON_S = 30.0
KEY = asyncssh.generate_private_key("ssh-ed25519")
OTHER = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
PASSWORD = "correct horse"


def line_of(key: asyncssh.SSHKey) -> str:
    return key.export_public_key("openssh").decode().strip()


@dataclass
class Gateway:
    """A gateway in front of a house."""

    yard: Yard
    port: int

    @asynccontextmanager
    async def login(
        self, user: object, key: asyncssh.SSHKey | None = KEY, **options: Any
    ) -> AsyncIterator[asyncssh.SSHClientConnection]:
        options = {"password": None, "login_timeout": SOON_S, **options}
        async with asyncssh.connect(
            "127.0.0.1", self.port, username=str(user), known_hosts=None, config=None,
            client_keys=[key] if key else None, agent_path=None, **options,
        ) as connection:  # fmt: skip
            yield connection

    async def is_refused(self, user: object, key: Any = KEY, **options: Any) -> bool:
        try:
            async with self.login(user, key, **options):
                return False
        except asyncssh.PermissionDenied:
            return True
        except asyncssh.ProtocolError:
            return "password" in options  # one that the protocol itself does not allow

    async def box(self, **body: object) -> dict[str, Any]:
        return await self.yard.create(**{"sshKeys": [line_of(KEY)], **body})


@asynccontextmanager
async def gateway_of(yard: Yard, **options: Any) -> AsyncIterator[Gateway]:
    services = yard.house.control.services
    async with open_gateway(
        host="127.0.0.1", port=0, host_key=ssh_host_key(yard.home), logins=services.logins,
        processes=services.processes, clock=services.clock, forwards=services.forwards, **options,
    ) as port:  # fmt: skip
        yield Gateway(yard, port)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_yard(tmp_path, saves=True) as yard, gateway_of(yard) as made:
        yield made


async def run(connection: asyncssh.SSHClientConnection, command: str, **options: Any) -> Any:
    async with asyncio.timeout(SOON_S):
        return await connection.run(command, encoding=None, **options)


# --- sessions ---------------------------------------------------------------------------------


async def test_a_command_says_what_it_says_and_ends_as_it_ends(gateway: Gateway) -> None:
    box = await gateway.box(name="named")
    for user in (box["id"], "named"):
        async with gateway.login(user) as connection:
            done = await run(connection, "hello there")
            assert (done.stdout, done.stderr, done.exit_status) == (b"hello there", b"", 0)
            assert (await run(connection, "exit 7")).exit_status == 7
            data = bytes(range(256)) * 20_000
            done = await run(connection, "cat", input=data)
            assert done.stdout == data
            done = await run(connection, "spill 200000")
            assert done.stdout == bytes(200_000)
    assert (await gateway.yard.get(box))["lastActivityKind"] == "ssh"


async def test_signals_reach_it_and_tell_how_it_ended(gateway: Gateway) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        process = await connection.create_process("hang", encoding=None)
        process.send_signal("TERM")
        await process.wait_closed()
        assert process.exit_signal is not None
        assert process.exit_signal[0] == "TERM"


async def test_a_shell_has_a_terminal_with_a_size(gateway: Gateway) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        process = await connection.create_process(
            term_type="xterm", term_size=(90, 30), encoding=None
        )
        process.stdin.write(b"typed \xc3")
        assert await process.stdout.readexactly(7) == b"typed \xc3"
        ((_, program),) = gateway.yard.machine_of(box)._programs._by_pid.items()
        assert program.size is not None
        assert (program.size.columns, program.size.rows) == (90, 30)
        process.change_terminal_size(120, 0)
        await until(lambda: program.size is not None and program.size.columns == 120)
        assert program.size.rows == 24
        process.close()


async def test_what_is_no_session_of_ours_is_refused(gateway: Gateway) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection:
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process(subsystem="netconf", encoding=None)
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process("a\0b", encoding=None)
        assert (await run(connection, "still there")).stdout == b"still there"


async def test_many_sessions_share_a_connection(gateway: Gateway) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection:
        done = await asyncio.gather(*(run(connection, f"number {one}") for one in range(50)))
        assert [one.stdout for one in done] == [b"number %d" % one for one in range(50)]


async def test_ports_of_the_sandbox_are_reached_and_closed_ones_said_to_be(
    gateway: Gateway,
) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        for host in ("localhost", "127.0.0.1"):
            reader, writer = await connection.open_connection(host, ECHO_PORT)
            writer.write(b"x" * 3_000_000)
            writer.write_eof()
            assert await reader.read() == b"x" * 3_000_000
        with pytest.raises(asyncssh.ChannelOpenError, match="nothing listens"):
            await connection.open_connection("localhost", 1)
        # A fake machine takes no connections, so none can be forwarded from it.
        with pytest.raises(asyncssh.ChannelListenError):
            await connection.forward_remote_port("", 0, "localhost", 1)


# --- who may ----------------------------------------------------------------------------------


async def test_keys_and_passwords_open_their_own_sandbox_and_no_other(gateway: Gateway) -> None:
    box = await gateway.box(rootPassword=PASSWORD, name="mine")
    other = await gateway.yard.create(sshKeys=[], name="closed")
    assert not await gateway.is_refused(box["id"])
    assert not await gateway.is_refused(box["id"], None, password=PASSWORD)
    assert await gateway.is_refused(box["id"], OTHER)
    assert await gateway.is_refused(box["id"], None, password="wrong horse")
    for user in (
        other["id"], "closed", "sandbox-aaaaaaaaaaaa", "root", "", "x" * 300, "MINE", "mine ", "é",
    ):  # fmt: skip
        assert await gateway.is_refused(user), user
        assert await gateway.is_refused(user, None, password=PASSWORD), user
    for password in ("", "\0", "é" * 100, "x" * 5000):
        assert await gateway.is_refused(box["id"], None, password=password)


async def test_an_api_key_is_a_password_of_what_it_may_use(gateway: Gateway) -> None:
    yard = gateway.yard
    box = await yard.create(sshKeys=[], name="mine")
    org_id, user_id = await yard.first()
    reader = await yard.add_key(org_id, user_id, scopes=("sandbox:read",))
    for user in (box["id"], "mine"):
        assert not await gateway.is_refused(user, None, password=yard.key)
        for key in (await yard.stranger(), reader, "rt_live_" + "x" * 32):
            assert await gateway.is_refused(user, None, password=key)


async def test_an_api_key_that_was_revoked_opens_nothing_more(gateway: Gateway) -> None:
    yard = gateway.yard
    box = await yard.create(sshKeys=[])
    made = (await yard.client.post("/v1/api-keys", json={"name": "k"})).json()["data"]
    async with gateway.login(box["id"], None, password=made["key"]) as connection:
        assert (await run(connection, "exit 3")).exit_status == 3
        await yard.client.delete(f"/v1/api-keys/{made['id']}")
        done = await run(connection, "exit 3")
        assert done.exit_status == 255
        assert b"revoked" in done.stderr


async def test_a_key_that_was_revoked_opens_nothing_any_more(gateway: Gateway) -> None:
    yard = gateway.yard
    made = await yard.client.post("/v1/ssh-keys", json={"name": "k", "publicKey": line_of(OTHER)})
    key_id = made.json()["data"]["id"]
    boxes = []
    for body in ({}, {"sshKeys": [key_id]}, {"sshKeys": [key_id, line_of(KEY)]}):
        box = await yard.create(**body)
        boxes.append(box)
        said = (await yard.client.get(f"/v1/sandboxes/{box['id']}/ssh")).json()["data"]
        assert said["keyId"] == key_id
        assert not await gateway.is_refused(box["id"], OTHER)
        fork = (await yard.act(box, "fork", count=1))[0]
        await until_running(yard, fork)
    listed = (await yard.client.get("/v1/ssh-keys")).json()["data"]
    assert listed[0]["lastUsedAt"] is not None
    async with gateway.login(box["id"], OTHER) as connection:
        await yard.client.delete(f"/v1/ssh-keys/{key_id}")
        assert await gateway.is_refused(box["id"], OTHER)
        assert await gateway.is_refused(fork["id"], OTHER)
        assert not await gateway.is_refused(box["id"])  # the one that was given itself
        done = await run(connection, "exit 3")
        assert done.exit_status == 255
        assert b"the SSH key was deleted" in done.stderr
    # The first two took this key alone.
    configured = [(await yard.get(one))["sshAccessConfigured"] for one in boxes]
    assert configured == [False, False, True]


async def until_running(yard: Yard, box: dict[str, Any]) -> None:
    async def runs() -> bool:
        return (await yard.get(box))["status"] == "running"

    await eventually(runs)


async def _shell(connection: asyncssh.SSHClientConnection) -> asyncssh.SSHClientProcess[bytes]:
    return await connection.create_process("hang", encoding=None)


@pytest.mark.parametrize(
    "how",
    ["ssh key", "api key", "member", "password", "owner", "owner's password", "owner's own key"],
)
async def test_an_open_connection_ends_with_what_it_was_let_in_by(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ssh_gateway, "_LOOK_S", 0.05)
    monkeypatch.setattr(ssh_gateway, "_AUTHORIZE_S", 0.1)
    yard = gateway.yard
    org_id, _ = await yard.first()
    member = await yard.add_member(org_id)
    key = await yard.add_key(org_id, member)
    options: dict[str, Any] = {"key": OTHER}
    async with yard.client_of(key) as theirs:
        made = await theirs.post("/v1/ssh-keys", json={"name": "k", "publicKey": line_of(OTHER)})
        key_id = made.json()["data"]["id"]
        body: dict[str, Any] = {"rootPassword": PASSWORD, "name": "theirs"}
        if how == "owner's own key":
            body["sshKeys"] = [line_of(KEY)]
            options = {"key": KEY}
        box = (await theirs.post("/v1/sandboxes", params={"wait": 20}, json=body)).json()["data"]
        if how in ("api key", "owner"):
            options = {"key": None, "password": key}
        elif how in ("password", "owner's password"):
            options = {"key": None, "password": PASSWORD}
        async with gateway.login(box["id"], **options) as connection, asyncio.timeout(SOON_S):
            open_ = await _shell(connection)
            with pytest.raises(TimeoutError):  # looked at several times, and still good
                async with asyncio.timeout(0.5):
                    await connection.wait_closed()
            if how == "ssh key":
                await theirs.delete(f"/v1/ssh-keys/{key_id}")
            elif how == "api key":
                (mine,) = (await theirs.get("/v1/api-keys")).json()["data"]
                await theirs.delete(f"/v1/api-keys/{mine['id']}")
            elif how == "member" or how.startswith("owner"):
                administration = Administration(
                    store=yard.house.store, clock=SystemClock(),
                    sign_up=SignUp(0, "enterprise", 5), plans={},
                )  # fmt: skip
                await administration.remove_member(org_id, member)
            else:
                async with yard.house.store.write(Turn.ALONE) as tx:
                    stored = await tx.sandboxes.find(box["id"])
                    assert stored is not None
                    await tx.sandboxes.replace(replace(stored, root_password_hash="$2b$other"))
            await connection.wait_closed()
            await open_.wait_closed()
        if how != "password":  # what stands for another's hash is none
            assert await gateway.is_refused(box["id"], **options)
    opened = yard.house.control.services.processes._open._shares._held
    await until(lambda: not opened)


async def test_a_name_is_looked_up_in_one_organization_only(gateway: Gateway) -> None:
    yard = gateway.yard
    mine = await gateway.box(name="same", rootPassword=PASSWORD)
    own = (await yard.client.get("/v1/organizations/current")).json()["data"]["slug"]
    # As long as there is one organization, a name is enough.
    for options in ({"key": KEY}, {"key": None, "password": PASSWORD}):
        assert not await gateway.is_refused("same", **options)
        assert not await gateway.is_refused(f"same.{own}", **options)
    async with yard.client_of(await yard.stranger()) as stranger:
        slug = (await stranger.get("/v1/organizations/current")).json()["data"]["slug"]
        # A stranger's sandbox has the name and the key of ours, and a password of their own.
        body = {"name": "same", "sshKeys": [line_of(KEY)], "rootPassword": "stranger's"}
        theirs = (await stranger.post("/v1/sandboxes", params={"wait": 20}, json=body)).json()
        async with gateway.login("same") as connection:
            done = await run(connection, "hello")
            assert done.exit_status == 255
            assert b"<name>.<organization's slug>" in done.stderr
        banners: list[str] = []

        class Client(asyncssh.SSHClient):
            def auth_banner_received(self, msg: str, lang: str) -> None:
                banners.append(msg)

        for user, known in (("same", True), ("no-such-name", True), (f"no-such.{slug}", False)):
            banners.clear()
            assert await gateway.is_refused(user, None, password=PASSWORD, client_factory=Client), (
                user
            )
            assert bool(banners) is known, "what is there has no part in what is said"
        await reaches(gateway, f"same.{own}", mine)
        await reaches(gateway, f"same.{own}", mine, key=None, password=PASSWORD)
        await reaches(gateway, f"same.{slug}", theirs["data"])
        # An API key says whose it is.
        for user in ("same", f"same.{own}"):
            await reaches(gateway, user, mine, key=None, password=yard.key)
        assert await gateway.is_refused(f"same.{slug}", None, password=yard.key)
        # Ours is gone: nothing of a stranger's takes its place.
        await yard.client.delete(f"/v1/sandboxes/{mine['id']}")
        for user in (f"same.{own}", mine["id"]):
            assert await gateway.is_refused(user)
            assert await gateway.is_refused(user, None, password=yard.key)
        # A name may have dots itself.
        dotted = await gateway.box(name="v1.2")
        await reaches(gateway, f"v1.2.{own}", dotted)


async def reaches(
    gateway: Gateway, user: str, box: dict[str, Any], key: Any = KEY, **options: Any
) -> None:
    async def logins() -> int:
        async with gateway.yard.house.store.read() as tx:
            stored = await tx.sandboxes.find(box["id"])
            assert stored is not None
            query = ActivityQuery(stored.org_id, 500, matches={"sandbox_id": stored.id})
            lines = await tx.activity.page(query)
        return sum(one.event_type == "sandbox.ssh.connected" for one in lines)

    async def is_told() -> bool:
        return await logins() == before + 1

    before = await logins()
    async with gateway.login(user, key, **options) as connection:
        assert (await run(connection, "exit 3")).exit_status == 3
        await eventually(is_told)


async def test_who_tries_too_often_is_not_even_looked_at(tmp_path: Path) -> None:
    from sandyard.server.app.settings import AccountSettings

    sections = {"accounts": AccountSettings(failed_logins_per_minute=3)}
    async with open_yard(tmp_path, sections=sections) as yard, gateway_of(yard) as gateway:
        box = await gateway.box(rootPassword=PASSWORD)
        for _ in range(3):
            assert await gateway.is_refused(box["id"], None, password="wrong horse")
        assert await gateway.is_refused(box["id"], None, password=PASSWORD)
        # A key is not to be guessed, and is let in all the same.
        assert not await gateway.is_refused(box["id"])


async def test_a_login_is_told_of_in_the_feed(gateway: Gateway) -> None:
    box = await gateway.box()

    async def told() -> list[Any]:
        found = await gateway.yard.client.get(f"/v1/sandboxes/{box['id']}/activity")
        events = found.json()["data"]["events"]
        return [one for one in events if one["eventType"] == "sandbox.ssh.connected"]

    async with gateway.login(box["id"]):
        await eventually(lambda: _any(told()))
    (event,) = await told()
    assert event["attributes"]["address"] == "127.0.0.1"
    assert event["attributes"]["fingerprint"] == KEY.get_fingerprint()
    assert event["attributes"]["method"] == "key"


async def _any(found: Any) -> bool:
    return bool(await found)


async def test_what_the_api_says_of_it_is_so(gateway: Gateway) -> None:
    yard = gateway.yard
    box = await gateway.box(rootPassword=PASSWORD)
    assert (box["sshReady"], box["sshAuthMethod"]) == (True, "key_and_password")
    said = (await yard.client.get(f"/v1/sandboxes/{box['id']}/ssh")).json()["data"]
    assert said["command"] == f"ssh -p 2222 {box['id']}@127.0.0.1"
    name, _, key = said["knownHosts"].partition(" ")
    assert (name, key) == ("[127.0.0.1]:2222", said["hostKey"])
    known = asyncssh.import_known_hosts(f"[127.0.0.1]:{gateway.port} {said['hostKey']}\n")
    async with asyncssh.connect(
        "127.0.0.1", gateway.port, username=box["id"], known_hosts=known, client_keys=[KEY],
        config=None, agent_path=None,
    ):  # fmt: skip
        pass
    assert (await yard.create(sshKeys=[]))["sshReady"] is False
    await yard.act(box, "pause")
    assert (await yard.get(box))["sshReady"] is True
    await yard.client.patch(f"/v1/sandboxes/{box['id']}", json={"autoResume": False})
    assert (await yard.get(box))["sshReady"] is False


# --- sleep and death --------------------------------------------------------------------------


async def test_a_paused_sandbox_is_woken_by_whoever_runs_something(gateway: Gateway) -> None:
    box = await gateway.box()
    await gateway.yard.act(box, "pause")
    async with gateway.login(box["id"]) as connection:
        assert (await run(connection, "up again")).stdout == b"up again"
        assert (await gateway.yard.get(box))["status"] == "running"
        await gateway.yard.client.patch(f"/v1/sandboxes/{box['id']}", json={"autoResume": False})
        await gateway.yard.act(box, "pause")
        done = await run(connection, "up again")
        assert done.exit_status == 255
        assert done.stderr.startswith(b"sandyard: cannot log in to ")


@pytest.mark.parametrize("how", ["pause", "delete", "die"])
async def test_a_session_ends_with_its_machine_and_says_why(gateway: Gateway, how: str) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        process = await connection.create_process("hang", encoding=None)
        await eventually(lambda: _any(_programs(gateway, box)))
        if how == "pause":
            await gateway.yard.act(box, "pause")
        elif how == "delete":
            await gateway.yard.client.delete(f"/v1/sandboxes/{box['id']}")
        else:
            gateway.yard.machine_of(box).die()
        said = await process.stderr.read()
        assert said.startswith(b"sandyard: "), said
        await process.wait_closed()
        assert process.exit_status == 255


async def _programs(gateway: Gateway, box: dict[str, Any]) -> object:
    return gateway.yard.machine_of(box)._programs._by_pid


async def test_a_connection_ends_with_its_sandbox(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_gateway, "_LOOK_S", 0.05)
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        await gateway.yard.client.delete(f"/v1/sandboxes/{box['id']}")
        await connection.wait_closed()


async def test_a_client_that_vanishes_ends_its_session(gateway: Gateway) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection:
        process = await connection.create_process("hang", encoding=None)
        await eventually(lambda: _any(_programs(gateway, box)))
        services = gateway.yard.house.control.services
        opened = services.processes._open._shares._held
        assert sum(opened.values()) == 1
        connection.abort()
        await until(lambda: not opened)
        del process


async def test_the_gateways_end_is_told(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True) as yard:
        async with gateway_of(yard) as gateway:
            box = await gateway.box()
            client = asyncssh.SSHClient()
            told: list[Any] = []
            client.connection_lost = told.append  # type: ignore[assignment,method-assign]
            connection = await asyncssh.connect(
                "127.0.0.1", gateway.port, username=box["id"], known_hosts=None, config=None,
                client_keys=[KEY], agent_path=None, client_factory=lambda: client,
            )  # fmt: skip
        async with asyncio.timeout(SOON_S):
            await connection.wait_closed()
        assert "log in again in a moment" in str(told[0])


# --- crowds -----------------------------------------------------------------------------------


async def test_two_hundred_idle_connections_are_held_and_more_of_an_address_are_not(
    gateway: Gateway,
) -> None:
    box = await gateway.box()

    async def connected() -> asyncssh.SSHClientConnection:
        return await asyncssh.connect(
            "127.0.0.1", gateway.port, username=box["id"], known_hosts=None, config=None,
            client_keys=[KEY], agent_path=None,
        )  # fmt: skip

    opened = []
    try:
        for _ in range(10):
            opened += await asyncio.gather(*(connected() for _ in range(20)))
        assert (await run(opened[0], "still there")).exit_status == 0
        with pytest.raises((asyncssh.DisconnectError, ConnectionError)):
            await connected()
    finally:
        for one in opened:
            one.close()
        for one in opened:
            await one.wait_closed()
    assert not await gateway.is_refused(box["id"])


async def test_a_connection_has_so_many_channels_and_no_more(gateway: Gateway) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        opened = await asyncio.gather(
            *(connection.open_connection("localhost", ECHO_PORT) for _ in range(250)),
            return_exceptions=True,
        )
        good = [one for one in opened if not isinstance(one, BaseException)]
        assert 0 < len(good) <= 200
        for _, writer in good:
            writer.close()
        # Places that were given back are there again, once gateway and machine have them back.
        served = 0
        while served < 5:
            with suppress(asyncssh.ChannelOpenError):
                served += (await run(connection, "exit 3")).exit_status == 3
            await asyncio.sleep(0.01)


async def test_a_crowd_at_the_door_keeps_nobody_else_out(gateway: Gateway) -> None:
    box = await gateway.box()
    crowd = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(49)]
    try:
        assert not await gateway.is_refused(box["id"])
        async with asyncio.timeout(SOON_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            more, last = await asyncio.open_connection("127.0.0.1", gateway.port)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await more.readexactly(100_000)  # one address too many: it is closed
        writer.close()
        last.close()
        del reader
    finally:
        for _, writer in crowd:
            writer.close()


async def test_what_is_told_of_its_environment_is_bounded(gateway: Gateway) -> None:
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection:
        env = {f"NAME{number}": "x" * 100 for number in range(200)} | {"LAST": "x" * 200_000}
        assert (await run(connection, "exit 3", env=env)).exit_status == 3
    ((_, program),) = gateway.yard.machine_of(box)._programs._by_pid.items()
    assert len(program.wish.env) <= 64 + 3
    assert "LAST" not in program.wish.env


async def test_who_offers_key_after_key_is_sent_away(gateway: Gateway) -> None:
    box = await gateway.box()
    keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(25)]
    with pytest.raises(asyncssh.DisconnectError, match="too many invalid keys"):
        async with asyncssh.connect(
            "127.0.0.1", gateway.port, username=box["id"], known_hosts=None, config=None,
            client_keys=keys, agent_path=None,
        ):  # fmt: skip
            pass


async def test_nothing_weak_is_offered(gateway: Gateway) -> None:
    box = await gateway.box()
    weak: Any
    for weak in (
        {"kex_algs": ["diffie-hellman-group14-sha1", "ecdh-sha2-nistp256"]},
        {"encryption_algs": ["aes128-cbc", "3des-cbc"]},
        {"mac_algs": ["hmac-sha1"], "encryption_algs": ["aes128-ctr"]},
        {"server_host_key_algs": ["ssh-rsa"]},
    ):
        with pytest.raises(asyncssh.KeyExchangeFailed):
            async with gateway.login(box["id"], **weak):
                pass


async def test_keys_are_exchanged_so_that_no_quantum_computer_reads_along(
    gateway: Gateway,
) -> None:
    box = await gateway.box()
    # What a client offers that knows nothing newer is taken as well.
    for offered, taken in (([], b"mlkem768x25519-sha256"), (["curve25519-sha256"], None)):
        options: dict[str, Any] = {"kex_algs": offered} if offered else {}
        exchanged: list[Any] = []

        class Client(asyncssh.SSHClient):
            def __init__(self, exchanged: list[Any]) -> None:
                self.exchanged = exchanged

            def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
                real = conn.send_newkeys

                def send(*args: Any) -> None:
                    self.exchanged.append(conn._kex)
                    real(*args)

                conn.send_newkeys = send  # type: ignore[method-assign,assignment]

        factory = partial(Client, exchanged)
        async with gateway.login(box["id"], client_factory=factory, **options):
            assert exchanged[0].algorithm == (taken or offered[0].encode())


async def test_keys_are_not_exchanged_again_before_a_login(gateway: Gateway) -> None:
    box = await gateway.box()

    class Client(asyncssh.SSHClient):
        def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
            self.connection = conn

        def public_key_auth_requested(self) -> Any:
            self.connection._send_kexinit()
            return KEY

    with pytest.raises(asyncssh.DisconnectError, match="log in before"):
        async with gateway.login(box["id"], None, client_factory=Client):
            pass
    # Once logged in, a client may.
    async with gateway.login(box["id"], rekey_bytes=200_000) as connection:
        done = await run(connection, "cat", input=bytes(3_000_000))
        assert done.stdout == bytes(3_000_000)


async def test_sftp_is_carried_as_it_is_both_ways(gateway: Gateway) -> None:
    box = await gateway.box()
    data = bytes(range(256)) * 40_000
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        # On a fake machine every program that has the connection itself is an echo.
        process = await connection.create_process(subsystem="sftp", encoding=None)
        process.stdin.write(data)
        process.stdin.write_eof()
        assert await process.stdout.read() == data
        await process.wait_closed()
        assert process.exit_status == 0
        silent = await connection.create_process(subsystem="sftp", encoding=None)
        silent.stdin.write_eof()
        assert b"install openssh-sftp-server" in await silent.stderr.read()
        # A client that goes away in the middle leaves nothing.
        left = await connection.create_process(subsystem="sftp", encoding=None)
        left.stdin.write(b"x")
        assert await left.stdout.read(1) == b"x"
        left.close()
        opened = gateway.yard.house.control.services.processes._open._shares._held
        await until(lambda: not opened)


async def test_sftp_is_served_by_agents_that_know_no_pipes(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ops._BY_OP, "pipe")
    box = await gateway.box()
    async with gateway.login(box["id"]) as connection, asyncio.timeout(SOON_S):
        process = await connection.create_process(subsystem="sftp", encoding=None)
        process.stdin.write_eof()
        await process.wait_closed()
    ((_, program),) = gateway.yard.machine_of(box)._programs._by_pid.items()
    assert "sftp-server" in str(program.wish.command)
