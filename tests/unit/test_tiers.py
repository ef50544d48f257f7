"""Which tests run when: what is for hours, and what the time is too short for, says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import history

ROOT = Path(__file__).parents[2]
PROBE = """
import pytest

def test_usual():
    pass

@pytest.mark.long
def test_long():
    pass

@pytest.mark.kvm
def test_with_kvm():
    pass

@pytest.mark.kvm
@pytest.mark.core
def test_of_the_core():
    pass
"""


@pytest.mark.slow  # another pytest, thrice: it is what decides
@pytest.mark.parametrize(
    ("arguments", "passed", "said"),
    [
        ([], ["test_usual", "test_of_the_core"], "NOT RUN: scripts/test --all runs it"),
        (["--every"], ["test_usual", "test_long", "test_with_kvm", "test_of_the_core"], ""),
        (["--every", "--within", "0"], [], "4 tests NOT RUN: the time for tests was over"),
    ],
)
def test_each_tier_runs_what_it_should(
    tmp_path: Path, arguments: list[str], passed: list[str], said: str
) -> None:
    (tmp_path / "test_probe.py").write_text(PROBE)
    ran, output = run(tmp_path, *arguments)
    assert set(ran) == set(passed), output
    assert said in output


@pytest.mark.slow  # likewise, thrice
def test_the_next_run_begins_with_what_one_had_no_time_for(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_first():\n    pass\n")
    (tmp_path / "test_b.py").write_text(
        "import pytest\npytestmark = pytest.mark.large\n"  # and a module of those comes first
        "def test_second():\n    pass\ndef test_third():\n    pass\n"
    )
    (tmp_path / "test_c.py").write_text(
        "import pytest\ndef test_other():\n    pass\n"
        "@pytest.mark.long\ndef test_for_hours():\n    pass\n"
    )
    in_order = ("-p", "no:randomly")
    # It has no time for one, which is not the first of its module.
    ran, output = run(tmp_path, *in_order, "--within", "0", "-k", "third or hours")
    assert ran == []
    assert re.search(r"1 tests NOT RUN: .*\n.*test_b.py::test_third \(never passed here\)", output)
    ran, output = run(tmp_path, *in_order)
    assert ran == ["test_third", "test_second", "test_other", "test_first"], output
    ran, output = run(tmp_path, *in_order)
    assert ran == ["test_second", "test_third", "test_other", "test_first"], output
    assert history.read(tmp_path).left_out == set()


@pytest.mark.slow  # likewise, twice
def test_several_processes_share_modules_and_begin_with_what_was_left_out(tmp_path: Path) -> None:
    one = "import os, pathlib, pytest\n"
    for name in ("a", "b", "c", "d"):
        one += f"def test_{name}():\n"
        one += f"    pathlib.Path('{tmp_path}/{{0}}{name}').write_text(str(os.getpid()))\n"
    modules = ("one", "two", "three")
    for module in modules:
        (tmp_path / f"test_{module}.py").write_text(one.format(module))
    shared = ("-p", "no:randomly", "-n", "2")
    ran, output = run(tmp_path, *shared, "--within", "0", "-k", "two and test_c")
    assert ran == []
    assert re.search(r"1 tests NOT RUN: .*\n.*test_two.py::test_c \(never passed here\)", output)
    ran, output = run(tmp_path, *shared)
    assert sorted(ran) == sorted(3 * ["test_a", "test_b", "test_c", "test_d"]), output
    assert history.read(tmp_path).left_out == set()
    assert len(history.read(tmp_path).passed) == 12
    for module in modules:
        assert len({one.read_text() for one in tmp_path.glob(f"{module}[a-d]")}) == 1
    written = {one: one.stat().st_mtime_ns for one in tmp_path.glob("*[a-d]") if one.is_file()}
    assert min(written, key=lambda one: written[one]).name in ("twoc", "onea", "threea")
    assert written[tmp_path / "twoc"] < written[tmp_path / "twoa"]


@pytest.mark.parametrize("written", ["", "[]", '{"passed": 1, "left_out": []}', "{"])
def test_a_history_that_cannot_be_read_is_begun_anew(tmp_path: Path, written: str) -> None:
    (tmp_path / "history.json").write_text(written)
    assert history.read(tmp_path) == history.History()
    history.record({"a", "b"}, {"a"}, {"c"}, tmp_path)
    assert history.read(tmp_path).left_out == {"c"}
    assert set(history.read(tmp_path).passed) == {"a"}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "never passed here"), (70, "passed 1 min ago"), (7200, "passed 2 h ago"),
     (9 * 86_400, "passed 9 days ago"), (-50, "passed 0 min ago")],
)  # fmt: skip
def test_how_long_ago_a_test_passed(seconds: float | None, expected: str) -> None:
    assert history.age(None if seconds is None else 1e9 - seconds, 1e9) == expected


def run(folder: Path, *arguments: str) -> tuple[list[str], str]:
    """Run the tests in a folder by this project's rules; return those that passed, in order, and
    what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider",
         "-c", ROOT / "pyproject.toml", "--rootdir", ROOT,
         "--confcutdir", ROOT, "-p", "tests.conftest", *arguments, folder],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
        env={**os.environ, "SANDYARD_TEST_CACHE": str(folder)},
    )  # fmt: skip
    assert done.returncode in (0, 5), done.stdout + done.stderr
    lines = [one for one in done.stdout.splitlines() if "PASSED" in one]
    return [one.split("::")[1].split()[0] for one in lines], done.stdout
