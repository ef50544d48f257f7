"""Which build this is."""

import shutil
import subprocess
import sys
from pathlib import Path

import sandyard
from sandyard.build import build_version


def version_of(copy: Path) -> str:
    program = "from sandyard.build import build_version; print(build_version())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_copies_of_the_same_code_have_the_same_version(tmp_path: Path) -> None:
    package = tmp_path / "sandyard"
    shutil.copytree(Path(sandyard.__file__).parent, package)
    (package / "notes.txt").write_text("not code")
    assert version_of(tmp_path) == build_version()
    changed = package / "client" / "errors.py"
    changed.write_text(changed.read_text() + "# changed\n")
    other = version_of(tmp_path)
    assert other != build_version()
    assert other.split("+")[0] == build_version().split("+")[0]
