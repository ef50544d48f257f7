"""Which tests run when: what is for hours, and what the time is too short for, says so."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider",
         "-c", ROOT / "pyproject.toml", "--rootdir", ROOT,
         "--confcutdir", ROOT, "-p", "tests.conftest", *arguments, probe],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    ran = {one.split("::")[1].split()[0] for one in lines if " PASSED" in one}
    assert ran == set(passed), done.stdout
    assert said in done.stdout
