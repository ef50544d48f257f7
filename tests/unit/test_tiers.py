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
        "import pytest\npytestmark = pytest.mark.large\n"
        "def test_second():\n    pass\ndef test_third():\n    pass\n"
    )
    (tmp_path / "test_c.py").write_text(
        "import pytest\ndef test_other():\n    pass\n"
        "@pytest.mark.long\ndef test_for_hours():\n    pass\n"
    )
    in_order = ("-p", "no:randomly")
    # It has no time for one, of a module that comes last.
    ran, output = run(tmp_path, *in_order, "--within", "0", "-k", "third or hours")
    assert ran == []
    assert re.search(r"1 tests NOT RUN: .*\n.*test_b.py::test_third \(never passed here\)", output)
    ran, output = run(tmp_path, *in_order)
    assert ran == ["test_third", "test_second", "test_first", "test_other"], output
    ran, output = run(tmp_path, *in_order)
    assert ran == ["test_first", "test_other", "test_second", "test_third"], output
    assert history.read(tmp_path).left_out == set()


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
    lines = done.stdout.splitlines()
    return [one.split("::")[1].split()[0] for one in lines if " PASSED" in one], done.stdout
