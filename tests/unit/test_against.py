"""Figures of two commits, side by side."""

import subprocess
from pathlib import Path

import pytest
from bench.against import Row, compared, figures_in, python_of, tree_of
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
BOTH = [{"create": {"cpu ms": 4.0, "a second": 100.0}, "pause": {"ms": 0.0}}]


def row(unit: str, *ratios: float) -> Row:
    return Row("create", unit, 1.0, 1.0, ratios)


def test_a_figure_of_both_has_its_ratio_and_the_spread_of_the_turns() -> None:
    before = [{"create": {"ms": ms}, "gone": {"ms": 1.0}} for ms in (10.0, 20.0, 10.0)]
    after = [{"create": {"ms": ms}, "new": {"ms": 1.0}} for ms in (12.0, 20.0, 15.0)]
    (found,) = compared(before, after)
    assert found == Row("create", "ms", 10.0, 15.0, (1.0, 1.2, 1.5))
    assert "1.20 (1.00 to 1.50)" in str(found)


def test_what_was_nothing_has_no_ratio() -> None:
    assert {one.what for one in compared(BOTH, BOTH)} == {"create"}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (row("ms", 1.06, 1.3), "worse"),
        (row("ms", 1.3), ""),
        (row("ms", 1.04, 1.3), ""),
        (row("ms", 0.7, 0.94), "better"),
        (row("ms", 0.7, 0.96), ""),
        (row("a second", 1.06, 1.3), "better"),
        (row("a second", 0.7, 0.94), "worse"),
        (row("a second", 0.7, 1.3), ""),
    ],
)
def test_only_what_every_turn_says_is_called_better_or_worse(found: Row, verdict: str) -> None:
    assert found.verdict == verdict
    assert str(found).endswith(verdict)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_a_tree_is_like_itself(values: list[float]) -> None:
    turns = [{"get": {"ms": value}} for value in values]
    (found,) = compared(turns, turns)
    assert set(found.ratios) == {1.0}
    assert found.verdict == ""


def test_figures_are_found_in_what_benches_print() -> None:
    assert figures_in('create   ms 1\n{"create": {"ms": 1}}\n') == {"create": {"ms": 1}}
    assert figures_in('[\n {"create": {"ms": 1}},\n "qemu-tcg"\n]') == {"create": {"ms": 1}}


def test_a_commit_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(SystemExit, match="there is no commit no-such-thing here"),
        tree_of("no-such-thing"),
    ):
        pass


def test_the_tree_of_a_commit_is_lent() -> None:
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("NOT RUN: this is not a clone")
    with tree_of("HEAD") as tree:
        assert (tree / "bench/control.py").exists()
        where = "import sandyard, bench, httpx, sys; print(sandyard.__file__, bench.__file__)"
        # Isolated, as servers start some of their processes.
        found = subprocess.run(
            [python_of(tree), "-I", "-c", where], capture_output=True, text=True, check=True
        ).stdout
        assert found.split() == [f"{tree}/src/sandyard/__init__.py", f"{tree}/bench/__init__.py"]
        version = subprocess.run([tree / ".venv/bin/sandyard", "--version"], check=False)
        assert version.returncode == 0
    assert not tree.exists()
    listed = subprocess.run(
        [*git, "worktree", "list"], capture_output=True, text=True, check=True
    ).stdout
    assert str(tree) not in listed
