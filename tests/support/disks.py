"""A folder on a disk of its own, which can be full while the host's is not."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_disk(folder: Path, image: Path, *, size_mib: int) -> Iterator[None]:
    """Have a folder lie on a disk of its own, in a new file.

    Not on a tmpfs: that gives memory to holes which are only read, so that a machine dies of a full
    one when it first looks at memory that it has not used before.
    """
    with image.open("xb") as file:
        file.truncate(size_mib * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        folder.chmod(0o711)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False)
