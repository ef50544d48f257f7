"""A hypervisor without hypervisor: for tests of the rooms above, and to measure them alone.

Its machines are small agents in this process that speak the real protocol over a Unix socket in
the machine's folder. FakeHost plays the host: it outlives any node, so a node that is started
again finds its machines there. Conduct makes it misbehave the ways real ones do.
"""

import asyncio
import itertools
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sandyard.server.core import wire
from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.drivers.contract import Capabilities, End, Handle, MachineSpec, Verdict

_PIDS = itertools.count(1_000_000_000)  # above any real pid: nothing can be killed by mistake
AGENT_SOCKET = "agent.sock"


@dataclass
class Conduct:
    """How the machines of a fake driver behave; the default is well."""

    start_delay_s: float = 0.0
    is_ready: bool = True
    makes_progress: bool = True
    dies_at_birth: bool = False
    starts: bool = True
    leaks: bool = False
    can_be_stopped: bool = True
    is_usable: bool = True


@dataclass
class FakeHost:
    """The host that fake machines live on."""

    machines: dict[int, "FakeMachine"] = field(default_factory=dict)


class FakeMachine:
    """See drivers.contract.Machine."""

    def __init__(self, host: FakeHost, spec: MachineSpec, conduct: Conduct) -> None:
        self.pid = next(_PIDS)
        self.spec = spec
        self._host = host
        self._conduct = conduct
        self._ended = asyncio.Event()
        self._end = End("machine_died", "the hypervisor's process ended")
        self._token: str | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._ticks = itertools.count()
        self.stalled: End | None = None

    @property
    def handle(self) -> Handle:
        """See drivers.contract.Machine.handle."""
        return {"pid": self.pid}

    async def boot(self) -> None:
        """Bring up the agent, as far as its conduct allows."""
        if self._conduct.is_ready:
            self._server = await asyncio.start_unix_server(
                self._serve, self.spec.folder / AGENT_SOCKET
            )

    async def console(self) -> bytes:
        """See drivers.contract.Machine.console."""
        tick = next(self._ticks)
        return f"tick {tick}\n".encode() if self._conduct.makes_progress or tick == 0 else b""

    async def stall(self) -> End | None:
        """See drivers.contract.Machine.stall."""
        return self.stalled

    async def wait(self) -> End:
        """See drivers.contract.Machine.wait."""
        await self._ended.wait()
        return self._end

    async def stop(self) -> None:
        """See drivers.contract.Machine.stop."""
        if not self._conduct.can_be_stopped and not self._ended.is_set():
            raise UnavailableError(f"cannot end the process {self.pid}: it does not react")
        self.die()

    async def detach(self) -> None:
        """See drivers.contract.Machine.detach."""

    def die(self) -> None:
        """End at once, as a killed process does."""
        if not self._ended.is_set():
            self._ended.set()
            if self._server is not None:
                self._server.close()
                for writer in self._writers:
                    writer.transport.abort()
            with suppress(OSError):
                (self.spec.folder / AGENT_SOCKET).unlink()
            if not self._conduct.leaks:
                self._host.machines.pop(self.pid, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = wire.Decoder()
        self._writers.add(writer)
        try:
            while (request := decoder.take_request()) is None:
                data = await reader.read(65536)
                if not data:
                    return
                decoder.feed(data)
            # The disk's token is what the node wrote before the start.
            self._token = self._token or (self.spec.disk.parent / "token").read_text()
            if request.token != self._token:
                answer = wire.Answer({}, error="unauthorized", message="the token is wrong")
            else:
                answer = wire.Answer(self._answer(request))
            writer.write(wire.encode_answer(answer))
            if request.op is wire.Op.EXEC and answer.error is None:
                await self._exec(request.args, writer)
            await writer.drain()
        except (OSError, wire.WireError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, request: wire.Request) -> dict[str, object]:
        if request.op is wire.Op.SETUP:
            self._token = str(request.args["token"])
        if request.op is wire.Op.STATS:
            return {
                "cpuPercent": 0.5, "memoryUsedBytes": 2**20, "memoryTotalBytes": 2**29,
                "diskUsedBytes": 2**20, "diskTotalBytes": 2**30, "uptime": 1.0,
            }  # fmt: skip
        return {"pid": 1}

    async def _exec(self, args: Mapping[str, object], writer: asyncio.StreamWriter) -> None:
        """Echo the command; `hang` never answers and `die` takes the machine down."""
        if args["command"] == "hang":
            await self._ended.wait()
            return
        if args["command"] == "die":
            self.die()
            return
        writer.write(wire.encode_frame(wire.Channel.STDOUT, str(args["command"]).encode()))
        end = {"exitCode": 0, "signal": None, "timedOut": False, "durationMs": 1}
        writer.write(wire.encode_frame(wire.Channel.EXIT, json.dumps(end).encode()))


class FakeDriver:
    """See drivers.contract.Driver."""

    name = "fake"
    capabilities = Capabilities(saves=False)

    def __init__(self, host: FakeHost, conduct: Conduct | None = None) -> None:
        self._host = host
        self.conduct = conduct or Conduct()

    async def version(self) -> str:
        """See drivers.contract.Driver.version."""
        return "1"

    async def probe(self, *, kernel: Path, initrd: Path, scratch: Path) -> Verdict:
        """See drivers.contract.Driver.probe."""
        if self.conduct.is_usable:
            return Verdict(True, "fake machines start anywhere")
        return Verdict(False, "told not to be usable")

    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> FakeMachine:
        """See drivers.contract.Driver.start."""
        conduct = self.conduct
        if not conduct.starts:
            raise InternalError(f"cannot start {spec.name}: told not to")
        machine = FakeMachine(self._host, spec, conduct)
        self._host.machines[machine.pid] = machine
        held.push_async_callback(machine.stop)
        await asyncio.sleep(conduct.start_delay_s)
        await machine.boot()
        if conduct.dies_at_birth:
            machine.die()
        return machine

    async def recover(self, handle: Handle, held: AsyncExitStack) -> FakeMachine | None:
        """See drivers.contract.Driver.recover."""
        machine = self._host.machines.get(int(handle["pid"]))
        if machine is None:
            return None
        held.push_async_callback(machine.stop)
        return machine
