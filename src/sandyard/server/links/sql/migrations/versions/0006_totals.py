"""What an organization's sandboxes take together, kept up by the database itself.

Triggers see every change of a row, whichever statement makes it, with what it was before: so the
sums are exact, and to read them takes no longer for ten thousand sandboxes than for one. Whoever
copies one of the two tables to alter it must make its triggers again.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_ACTIVE = "('pending', 'creating', 'running', 'pausing', 'resuming', 'suspected_missing')"
_GONE = "('destroyed', 'orphaned', 'destroying')"
_EPOCH_S = 1_735_689_600  # 2025: seconds times MiB of many disks must stay within 64 bits


def _of_sandbox(row: str) -> dict[str, str]:
    """Return what one sandbox adds to each sum."""
    active = f"{row}.status IN {_ACTIVE}"
    lives = f"{row}.status NOT IN {_GONE}"
    paid = f"{active} AND NOT {row}.is_test"
    return {
        "active": _if(active, "1"),
        "vcpus": _if(active, f"{row}.vcpus"),
        "memory_mib": _if(active, f"{row}.memory_mib"),
        "disk_mib": _if(lives, f"{row}.disk_mib"),
        "tests": _if(f"{lives} AND {row}.is_test", "1"),
        "paid_vcpus": _if(paid, f"{row}.vcpus"),
        "paid_memory_mib": _if(paid, f"{row}.memory_mib"),
        "paid_disk_mib": _if(paid, f"{row}.disk_mib"),
    }


def _of_period(row: str) -> dict[str, str]:
    """Return what one period adds: seconds that were, and what goes on since when."""
    owed = f"NOT {row}.is_settled AND NOT {row}.is_free"
    is_open = f"{owed} AND {row}.ended_at IS NULL"
    # `/` of whole numbers is a whole number in both databases.
    since = f"({row}.started_at / 1000000 - {_EPOCH_S})"
    until = f"(coalesce({row}.ended_at, 0) / 1000000 - {_EPOCH_S})"
    sums = {"owed_posted": _if(owed, f"{row}.posted")}
    for name in ("vcpus", "memory_mib", "disk_mib"):
        value = f"CAST({row}.{name} AS BIGINT)"
        sums[f"open_{name}"] = _if(is_open, value)
        sums[f"owed_{name}_s"] = (
            f"CASE WHEN {is_open} THEN -{value} * {since} "
            f"WHEN {owed} THEN {value} * ({until} - {since}) ELSE 0 END"
        )
    return sums


def _if(condition: str, value: str) -> str:
    return f"CASE WHEN {condition} THEN {value} ELSE 0 END"


def _add(row: str, sums: dict[str, str]) -> str:
    names = ", ".join(sums)
    added = ", ".join(f"{name} = org_totals.{name} + excluded.{name}" for name in sums)
    return (
        f"INSERT INTO org_totals (org_id, {names}) "
        f"VALUES ({row}.org_id, {', '.join(sums.values())}) "
        f"ON CONFLICT (org_id) DO UPDATE SET {added};"
    )


_SANDBOX = ("status", "vcpus", "memory_mib", "disk_mib", "is_test")
_PERIOD = (
    "vcpus", "memory_mib", "disk_mib", "started_at", "ended_at", "is_free", "posted", "is_settled",
)  # fmt: skip


def upgrade() -> None:
    """Make the sums, their triggers, and what they are of the rows that are there."""
    counted = (
        "active", "vcpus", "memory_mib", "disk_mib", "tests", "paid_vcpus", "paid_memory_mib",
        "paid_disk_mib", "owed_posted", "open_vcpus", "owed_vcpus_s", "open_memory_mib",
        "owed_memory_mib_s", "open_disk_mib", "owed_disk_mib_s",
    )  # fmt: skip
    op.create_table(
        "org_totals",
        sa.Column("org_id", sa.String(36), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False, server_default="0") for name in counted),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_org_totals_org_id"),
        sa.PrimaryKeyConstraint("org_id", name="pk_org_totals"),
    )
    for table, columns, adds in (
        ("sandboxes", _SANDBOX, _of_sandbox),
        ("usage_periods", _PERIOD, _of_period),
    ):
        sums = adds(table)
        names = ", ".join(sums)
        whole = ", ".join(f"coalesce(sum({value}), 0)" for value in sums.values())
        added = ", ".join(f"{name} = excluded.{name}" for name in sums)
        op.execute(
            f"INSERT INTO org_totals (org_id, {names}) "
            f"SELECT org_id, {whole} FROM {table} WHERE true GROUP BY org_id "
            f"ON CONFLICT (org_id) DO UPDATE SET {added}"
        )
        new, old = adds("NEW"), adds("OLD")
        changed = {name: f"({new[name]}) - ({old[name]})" for name in new}
        gone = {name: f"-({value})" for name, value in old.items()}
        # The organization of a row never changes.
        differs = " OR ".join(f"OLD.{name} IS DISTINCT FROM NEW.{name}" for name in columns)
        for name, event, when, statement in (
            ("insert", "INSERT", "", _add("NEW", new)),
            ("update", f"UPDATE OF {', '.join(columns)}", differs, _add("NEW", changed)),
            ("delete", "DELETE", "", _add("OLD", gone)),
        ):
            _make_trigger(f"{table}_{name}_totals", table, event, when, statement)


def _make_trigger(name: str, table: str, event: str, when: str, statement: str) -> None:
    head = f"CREATE TRIGGER {name} AFTER {event} ON {table} FOR EACH ROW"
    if op.get_bind().dialect.name == "sqlite":
        when = f"WHEN {when.replace('IS DISTINCT FROM', 'IS NOT')}" if when else ""
        op.execute(f"{head} {when} BEGIN {statement} END")
        return
    when = f"WHEN ({when})" if when else ""
    op.execute(
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {statement} RETURN NULL; END $$"
    )
    op.execute(f"{head} {when} EXECUTE FUNCTION {name}()")
