"""Another commit's figures beside this tree's: both are measured alternately on one host.

    .venv/bin/python -m bench --against COMMIT [--turns 3] [--only control] [--burners 1]

Each turn runs both trees one after the other, and changes which is first, so that a slow moment of
the host hits both. A ratio is this tree's figure divided by the commit's: the median of the turns,
with the lowest and the highest beside it. What lies on one side of 1 by 5 % or more in every turn
is marked. A tree is measured by its own benches and its own code, with the packages that are
installed for this one.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from bench.figures import burn

_ROOT = Path(__file__).parents[1]
_MORE_IS_BETTER = {"a second"}
_BENCHES = {
    "control": ["--rounds", "{control}", "--rows", "1000"],
    "guests": ["--rounds", "{guests}"],
}
_LIMIT_S = 1800
_CLEAR = 0.05
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One figure of both trees, and its ratios, lowest first."""

    what: str
    unit: str
    theirs: float
    ours: float
    ratios: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """`worse` or `better` if every one of several turns says so, else nothing."""
        if len(self.ratios) < 2:
            return ""
        if self.ratios[0] < 1 + _CLEAR and self.ratios[-1] > 1 - _CLEAR:
            return ""
        return "better" if (self.ratios[0] > 1) == (self.unit in _MORE_IS_BETTER) else "worse"

    def __str__(self) -> str:
        ratio = f"{median(self.ratios):5.2f} ({self.ratios[0]:.2f} to {self.ratios[-1]:.2f})"
        return (
            f"{self.what:44} {self.unit:>10} {self.theirs:9.2f} {self.ours:9.2f}  {ratio}"
            f"  {self.verdict}".rstrip()
        )


def compared(theirs: Sequence[Figures], ours: Sequence[Figures]) -> list[Row]:
    """Return a row for each figure that both trees have in every turn; those that are zero have no
    ratio and are left out."""
    rows = []
    for what, values in ours[0].items():
        for unit in values:
            pairs = [
                (old[what][unit], new[what][unit])
                for old, new in zip(theirs, ours, strict=True)
                if old.get(what, {}).get(unit) and unit in new.get(what, {})
            ]
            if len(pairs) == len(ours):
                ratios = sorted(new / old for old, new in pairs)
                before, after = (median(one) for one in zip(*pairs, strict=True))
                rows.append(Row(what, unit, before, after, tuple(ratios)))
    return rows


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """Lend a work tree of a commit."""
    found = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if found.returncode:
        raise SystemExit(
            f"error: there is no commit {commit} here; `git log` lists those there are"
        )
    with tempfile.TemporaryDirectory(prefix="against-") as folder:
        place = Path(folder) / "tree"
        made = _git("worktree", "add", "--quiet", "--detach", place, found.stdout.strip())
        if made.returncode:
            raise SystemExit(f"error: cannot check {commit} out: {made.stderr.strip()}")
        try:
            _make_environment(place)
            yield place
        finally:
            _git("worktree", "remove", "--force", place)
            _git("worktree", "prune")


def _make_environment(tree: Path) -> None:
    """Make the Python environment of a tree: its own code, and the packages that are installed
    here. By PYTHONPATH alone, programs that are started in isolated mode would be this tree's."""
    venv.create(tree / ".venv", symlinks=True)
    (packages,) = (tree / ".venv").glob("lib/python*/site-packages")
    here = Path(httpx.__file__).parents[1]
    (packages / "tree.pth").write_text(f"{tree / 'src'}\n{tree}\n{here}\n")
    script = tree / ".venv/bin/sandyard"
    _, _, rest = (Path(sys.executable).parent / "sandyard").read_text().partition("\n")
    script.write_text(f"#!{tree / '.venv/bin/python'}\n{rest}")
    script.chmod(0o755)


def python_of(tree: Path) -> Path:
    """Return the Python that runs a tree's own code."""
    return Path(sys.executable) if tree == _ROOT else tree / ".venv/bin/python"


def measured(tree: Path, bench: str, arguments: Sequence[str]) -> Figures:
    """Run a bench of a tree and return its figures."""
    done = subprocess.run(
        [python_of(tree), "-m", f"bench.{bench}", *arguments], cwd=tree,
        stdout=subprocess.PIPE, text=True, check=False, timeout=_LIMIT_S,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: bench.{bench} of {tree} failed; what it printed is above")
    return figures_in(done.stdout)


def figures_in(printed: str) -> Figures:
    """Return the figures in what a bench printed: all of it, or its last line, is JSON; it may have
    the name of a driver beside them."""
    try:
        found = json.loads(printed)
    except ValueError:
        found = json.loads(printed.splitlines()[-1])
    figures: Figures = found[0] if isinstance(found, list) else found
    return figures


@contextmanager
def burning(count: int) -> Iterator[None]:
    """Keep some processors busy."""
    burners = [multiprocessing.Process(target=burn, daemon=True) for _ in range(count)]
    for one in burners:
        one.start()
    try:
        yield
    finally:
        for one in burners:
            one.kill()
            one.join()


def run(asked: argparse.Namespace) -> None:
    """Measure both trees and print the table."""
    benches = {name: _BENCHES[name] for name in asked.only or _BENCHES}
    rounds = {"control": asked.rounds * 25, "guests": asked.rounds}
    with tree_of(asked.against) as theirs, burning(asked.burners):
        for bench, template in benches.items():
            arguments = [one.format(**rounds) for one in template]
            found: dict[Path, list[Figures]] = {theirs: [], _ROOT: []}
            for turn in range(asked.turns):
                for tree in (theirs, _ROOT) if turn % 2 == 0 else (_ROOT, theirs):
                    found[tree].append(measured(tree, bench, arguments))
                    print(f"{bench}: turn {turn + 1} of {asked.turns}", file=sys.stderr)
            heading = f"{asked.turns} turns: lowest to highest"
            print(f"{bench:44} {'':>10} {asked.against[:9]:>9} {'now':>9}  ratio ({heading})")
            for row in compared(found[theirs], found[_ROOT]):
                print(row)


def _git(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False, timeout=120
    )
