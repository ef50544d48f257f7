"""Templates for tests: built once, kept by content in a cache that runs share."""

import asyncio
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sandyard.server.app.settings import NodeSettings, Settings
from sandyard.server.app.wiring import builder_of
from sandyard.server.node.images.image import Image

CACHE = Path(os.environ.get("SANDYARD_TEST_CACHE", "/var/cache/sandyard-tests"))
_WIDE = ("AVX", "AVX2", "FMA", *(f"AVX512{one}" for one in ("F", "VL", "BW", "CD", "DQ")), "XSAVEC")
_NARROW = "glibc.cpu.hwcaps=" + ",".join(f"-{one}" for one in _WIDE)
# AVX in the first word; AVX2 and what begins with AVX-512 in the second (OPENSSL_ia32cap(3)).
_NARROW_OPENSSL = "~0x1000000000000000:~0xd0230020"
_built: dict[Path | None, Image] = {}


ADDRESS = "10.213.77.2"
"""Of the registry that the certificate is for."""


def trusted() -> Path:
    """Return a certificate that all templates of tests trust; its key lies beside it.

    It is always the same one: what is built of it is kept.
    """
    folder = CACHE / "trusted"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as passing:
            made = Path(passing) / "made"
            made.mkdir(mode=0o755)
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "7300",
                 "-set_serial", "4711", "-subj", "/CN=Tests of Sandyard",
                 "-addext", f"subjectAltName=IP:{ADDRESS}", "-keyout", made / "key.pem",
                 "-out", made / "certificate.pem"],
                check=True, capture_output=True,
            )  # fmt: skip
            with suppress(OSError):  # another process was faster
                made.rename(folder)
    return folder / "certificate.pem"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Have one process of those that run tests make what all of them use."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "making.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_settings(home: Path, *, kernel: Path | None = None) -> Settings:
    """Return settings whose images and packages lie in the cache."""
    node = NodeSettings(
        images_dir=CACHE / "images",
        cache_dir=CACHE / "packages",
        extra_ca=trusted(),
        templates_dir=None if kernel is None else templates_with(kernel),
    )
    return Settings(home=home, node=node)


def templates_with(kernel: Path) -> Path:
    """Return a folder with base-minimal, to be booted by a kernel for tests.

    Such a kernel may hide from itself what its programs see of the processor: it does not keep the
    wide registers when it switches between two of them, and both go on with broken data. So they
    are kept from using those: what glibc and OpenSSL choose by themselves.
    """
    folder = CACHE / "templates"
    folder.mkdir(parents=True, exist_ok=True)
    written = (Settings().templates_dir / "base-minimal.toml").read_text()
    head = f'kernel = "{kernel}"\nkernel_arguments = "GLIBC_TUNABLES={_NARROW}"\n'
    steps = "".join(f"echo {one} >> /etc/environment; " for one in environment_inside())
    assert "steps" not in written
    part = folder / f".part-{os.getpid()}"
    part.write_text(f'{head}steps = ["{steps}"]\n{written}')
    part.replace(folder / "base-minimal.toml")
    return folder


def environment_inside() -> tuple[str, str]:
    """Return what keeps programs from the wide registers, as lines of /etc/environment."""
    return (f"GLIBC_TUNABLES={_NARROW}", f"OPENSSL_ia32cap={_NARROW_OPENSSL}")


def cache_environment() -> dict[str, str]:
    """Return the same as an environment."""
    return {
        "SANDYARD_NODE__IMAGES_DIR": str(CACHE / "images"),
        "SANDYARD_NODE__CACHE_DIR": str(CACHE / "packages"),
        "SANDYARD_NODE__EXTRA_CA": str(trusted()),
    }


def minimal_image(kernel: Path | None = None) -> Image:
    """Return the image of base-minimal, built if it is not up to date; with a kernel if given."""
    if kernel not in _built:
        home = CACHE / ("home" if kernel is None else "home-kernel")
        builder = builder_of(cached_settings(home, kernel=kernel))
        # In a thread, for callers inside a loop: building runs a loop of its own.
        import threading

        def build() -> None:
            with one_at_a_time():
                _built[kernel] = asyncio.run(builder.build("base-minimal", progress=lambda _: None))

        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    return _built[kernel]
