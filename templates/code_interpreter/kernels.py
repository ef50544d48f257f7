"""Contexts in Jupyter kernels: Python and R."""

import contextlib
import os
import queue
import signal
import subprocess
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from code_interpreter.contexts import RUN, Context, account, identity
from code_interpreter.items import ENDED, Tell, error_of, ignore, result_of

PYTHON = (
    "/opt/venv/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}",
    f"--ipython-dir={RUN / 'ipython'}",
    "--InteractiveShell.colors=NoColor", "--HistoryManager.enabled=False",
    "--PlainTextFormatter.max_seq_length=0",
    "--InteractiveShellApp.extra_extensions=code_interpreter.display",
)  # fmt: skip
R = ("R", "--slave", "-e", "IRkernel::main()", "--args", "{connection_file}")
_LOOK_S = 1.0
"""How often a silent kernel is checked for having ended."""


class Manager(AsyncKernelManager):
    """Starts kernels that are the user's, of a command that is given."""

    command: tuple[str, ...] = ()

    @property
    def kernel_spec(self) -> KernelSpec:
        """The kernel's command, which is not looked up."""
        return KernelSpec(argv=list(self.command), display_name="kernel", language="")

    def write_connection_file(self, **values: object) -> None:
        """Write the file that has the kernel's ports and its key."""
        super().write_connection_file(**values)
        os.chown(self.connection_file, account().pw_uid, account().pw_gid)


class JupyterContext(Context):
    """A context in a Jupyter kernel."""

    def __init__(
        self, language: str, cwd: str, known: Mapping[str, str], command: tuple[str, ...]
    ) -> None:
        super().__init__(language, cwd, known)
        self.command = command
        self.manager: Manager | None = None
        self.client: Any = None
        self.asked = ""
        self.has_replied = False

    async def launch(self, env: Mapping[str, str]) -> None:
        await self.end()
        manager = Manager(connection_file=str(RUN / f"{self.id}.json"))
        manager.command = self.command
        self.manager = manager
        nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        await manager.start_kernel(env=dict(env), cwd=self.cwd, **nowhere, **identity())
        self.client = manager.client()
        # What does not fit would be dropped, the end of the code among it.
        self.client.context.rcvhwm = 0
        self.client.start_channels(stdin=False, hb=False, control=False)
        await self._until_ready()

    async def _until_ready(self) -> None:
        """Return once the kernel answers, and its reports arrive.

        `wait_for_ready` asks each second, and a kernel that starts slowly then answers all of that
        before it runs code.
        """
        while True:
            self.client.kernel_info()
            while True:
                try:
                    await self.client.get_shell_msg(timeout=_LOOK_S)
                    break
                except queue.Empty:
                    if not await self.is_alive():
                        raise RuntimeError("the kernel ended at once") from None
            with contextlib.suppress(queue.Empty):
                await self.client.get_iopub_msg(timeout=_LOOK_S)
                return

    async def is_alive(self) -> bool:
        return self.manager is not None and bool(await self.manager.is_alive())

    async def run(self, code: str, tell: Tell) -> None:
        self.ask(code)
        await self.follow(tell)

    async def silently(self, code: str) -> None:
        self.ask(code, silent=True, store_history=False)
        await self.follow(ignore)

    def ask(self, code: str, **how: bool) -> None:
        """Send a piece of code."""
        self.begun.clear()
        self.has_replied = False
        self.asked = self.client.execute(code, allow_stdin=False, stop_on_error=False, **how)

    async def settled(self) -> None:
        await self.follow(ignore)

    async def follow(self, tell: Tell) -> None:
        """Tell what the code reports, until the kernel is idle or has ended."""
        while self.asked:
            try:
                message = await self.client.get_iopub_msg(timeout=_LOOK_S)
            except queue.Empty:
                if not await self.is_alive():
                    self.asked = ""
                    await tell(ENDED)
                elif self.has_replied:  # and has been silent since: a report was lost
                    self.asked = ""
                await self.read_replies()
                continue
            # A thread of earlier code may still print. Its client has its answer.
            if message["parent_header"].get("msg_id") == self.asked:
                await self.pass_on(message, tell)
        self.begun.set()
        await self.read_replies()

    async def read_replies(self) -> None:
        """Read the kernel's replies. They tell nothing that was not reported, but that it was."""
        with contextlib.suppress(queue.Empty):
            while self.client is not None:
                reply = await self.client.get_shell_msg(timeout=0)
                is_it = reply["parent_header"].get("msg_id") == self.asked
                self.has_replied = self.has_replied or is_it

    async def pass_on(self, message: Mapping[str, Any], tell: Tell) -> None:
        """Tell what one message reports."""
        content, kind = message["content"], message["msg_type"]
        match kind:
            case "stream":
                date = message["header"]["date"]
                when = date.isoformat() if isinstance(date, datetime) else str(date)
                await tell({"type": content["name"], "text": content["text"], "timestamp": when})
            case "execute_input":
                count = content["execution_count"]
                await tell({"type": "number_of_executions", "execution_count": count})
            case "execute_result" | "display_data":
                await tell(result_of(content["data"], is_main=kind == "execute_result"))
            case "error":
                lines = "\n".join(content["traceback"])
                await tell(error_of(content["ename"], content["evalue"], lines))
            case "status" if content["execution_state"] == "busy":
                self.begun.set()
            case "status" if content["execution_state"] == "idle":
                self.asked = ""
            case _:
                pass

    async def interrupt(self) -> None:
        if self.manager is not None:
            await self.manager.interrupt_kernel()

    async def kill(self) -> None:
        if self.manager is not None and await self.is_alive():
            await self.manager.signal_kernel(signal.SIGKILL)

    async def end(self) -> None:
        manager, self.manager = self.manager, None
        client, self.client, self.asked = self.client, None, ""
        if client is not None:
            client.stop_channels()
        if manager is not None:
            with contextlib.suppress(RuntimeError, ProcessLookupError):
                await manager.shutdown_kernel(now=True)
