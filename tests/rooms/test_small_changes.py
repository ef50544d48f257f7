"""Small changes stay small: a field, an operation and an endpoint, added to a copy of the source in
as few files as CONTRIBUTING says, work."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = "src/sandyard/server"
MIGRATIONS = ROOT / SERVER / "links/sql/migrations/versions"
NEWEST = max(path.name[:4] for path in MIGRATIONS.glob("0*.py"))
Edits = Mapping[str, Sequence[tuple[str, str]]]

FIELD: Edits = {
    f"{SERVER}/core/records.py": [
        (
            "    pauses_at_end: bool = False\n",
            '    pauses_at_end: bool = False\n    note: str = ""\n',
        )
    ],
    f"{SERVER}/links/sql/tables.py": [
        (
            '    Column("pauses_at_end",',
            '    Column("note", Text, nullable=False, server_default=""),\n'
            '    Column("pauses_at_end",',
        )
    ],
    f"{SERVER}/links/sql/migrations/versions/0999_note.py": [
        (
            "",
            "import sqlalchemy as sa\nfrom alembic import op\n\n"
            f'revision, down_revision = "0999", "{NEWEST}"\nbranch_labels = depends_on = None\n\n\n'
            "def upgrade() -> None:\n"
            '    column = sa.Column("note", sa.Text(), nullable=False, server_default="")\n'
            '    op.add_column("sandboxes", column)\n',
        )
    ],
    f"{SERVER}/api/models/sandboxes.py": [
        (
            "    snapshot: str | None = None\n\n    def wish",
            '    snapshot: str | None = None\n    note: str = ""\n\n    def wish',
        ),
        (
            "    on_expiry: OnExpiry | None = None\n",
            "    on_expiry: OnExpiry | None = None\n    note: str | None = None\n",
        ),
        ("    expires_at: Time | None\n", "    expires_at: Time | None\n    note: str\n"),
    ],
    f"{SERVER}/service/sandboxes/create.py": [
        (
            "    pauses_at_end: bool = False\n",
            '    pauses_at_end: bool = False\n    note: str = ""\n',
        ),
        (
            "            mounts=mounts,\n            is_test",
            "            mounts=mounts,\n            note=wish.note,\n            is_test",
        ),
    ],
    f"{SERVER}/service/sandboxes/change.py": [
        (
            "    pauses_at_end: bool | None = None\n",
            "    pauses_at_end: bool | None = None\n    note: str | None = None\n",
        ),
        (
            "        return fields\n",
            "        if changes.note is not None:\n"
            '            fields["note"] = changes.note\n        return fields\n',
        ),
    ],
}
USE_FIELD = """
    box = await yard.create(note="first")
    assert box["note"] == "first"
    answer = await yard.client.patch(f"/v1/sandboxes/{box['id']}", json={"note": "second"})
    assert answer.json()["data"]["note"] == "second"
    assert (await yard.get(box))["note"] == "second"
    (fork,) = await yard.act(box, "fork", count=1)
    assert (await yard.get(fork))["note"] == "second"
    assert (await yard.create())["note"] == ""
"""

OPERATION: Edits = {
    f"{SERVER}/core/ops.py": [
        ('    STATS = "stats"\n', '    STATS = "stats"\n    ECHO = "echo"\n'),
        (
            "AnyOperation = (",
            "@dataclass(frozen=True)\nclass Echo(Operation[Greeting]):\n"
            '    """Return a number."""\n\n    op = Op.ECHO\n    answer = Greeting\n'
            "    number: int = 0\n\n\nAnyOperation = (\n    Echo |",
        ),
    ],
    f"{SERVER}/guest/agent.py": [
        (
            "            case ops.Hello():\n",
            "            case ops.Echo():\n"
            "                found = ops.Greeting(operation.number)\n"
            "                await answer(connection, found, again=again)\n"
            "            case ops.Hello():\n",
        )
    ],
    f"{SERVER}/fakes/driver.py": [
        (
            "            case ops.Hello():\n                return",
            "            case ops.Echo():\n                return ops.Greeting(operation.number)\n"
            "            case ops.Hello():\n                return",
        ),
        (
            "                ops.Hello() | ops.SetUp()",
            "                ops.Echo() | ops.Hello() | ops.SetUp()",
        ),
    ],
}
USE_OPERATION = """
    from sandyard.server.core import ops
    from sandyard.server.service.sandboxes.uses import Use

    box = await yard.create()
    services = yard.house.control.services
    actor = await services.access.authenticate(yard.key)
    reach = services.commands._reach
    async with reach.open(actor, box["id"], ops.Echo(7), Use("echo", "Echo", "echo in")) as reached:
        assert reached.answer == ops.Greeting(7)
"""

ENDPOINT: Edits = {
    f"{SERVER}/api/routes/sandboxes.py": [
        (
            '@router.get("/{reference}/logs"',
            '@router.get("/{reference}/age", responses=errors(404))\n'
            "async def age(request: Request, actor: CanRead, service: Service, reference: str)"
            " -> Data[float]:\n"
            '    """Return the age of a sandbox in seconds."""\n'
            "    return enveloped(request, await service.age_s(actor, reference))\n\n\n"
            '@router.get("/{reference}/logs"',
        )
    ],
    f"{SERVER}/service/sandboxes/change.py": [
        (
            "    async def logs(self,",
            "    async def age_s(self, actor: Actor, reference: str) -> float:\n"
            '        """Return the age of a sandbox in seconds."""\n'
            '        sandbox = await self.get(actor, reference, scope="sandbox:read")\n'
            "        return (self._clock.now() - sandbox.created_at).total_seconds()\n\n"
            "    async def logs(self,",
        )
    ],
}
USE_ENDPOINT = """
    box = await yard.create()
    answer = await yard.client.get(f"/v1/sandboxes/{box['id']}/age")
    assert answer.status_code == 200, answer.text
    assert 0 <= answer.json()["data"] < 60
    stranger = yard.client_of(await yard.stranger())
    assert (await stranger.get(f"/v1/sandboxes/{box['id']}/age")).status_code == 404
    await stranger.aclose()
    described = (await yard.client.get("/openapi.json")).json()["paths"]
    assert "/v1/sandboxes/{reference}/age" in described
"""


@pytest.mark.slow  # each starts a process that loads everything
@pytest.mark.parametrize(
    ("edits", "most", "use"),
    [(FIELD, 6, USE_FIELD), (OPERATION, 3, USE_OPERATION), (ENDPOINT, 2, USE_ENDPOINT)],
    ids=["field", "operation", "endpoint"],
)
def test_a_small_change_touches_few_files(
    tmp_path: Path, edits: Edits, most: int, use: str
) -> None:
    assert len(edits) <= most
    copy = tmp_path / "copy"
    for folder in ("src", "tests", "templates"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in edits.items():
        path = copy / name
        text = path.read_text() if path.exists() else ""
        for before, after in changes:
            assert before in text, f"{name}: {before!r} has moved; adapt this test"
            text = text.replace(before, after, 1) if before else after
        path.write_text(text)
    script = copy / "use.py"
    script.write_text(
        "import asyncio\nfrom pathlib import Path\n\n"
        "from tests.support.house import open_yard\n\n\n"
        "async def main() -> None:\n"
        f"    async with open_yard(Path({str(tmp_path / 'home')!r}), saves=True) as yard:\n"
        "        await use(yard)\n\n\n"
        f"async def use(yard):\n{use}\n\nasyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy}"},
        capture_output=True, text=True, check=False, timeout=280, cwd=copy,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
