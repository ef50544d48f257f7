"""Kernels as files: each packing, what they say of themselves, and what is asked of them."""

import gzip
import shutil
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandyard.server.app.settings import NodeSettings, Settings
from sandyard.server.core.errors import InvalidArgumentError, UnavailableError
from sandyard.server.drivers.kernels import KernelInfo, kernel_info, unpacked, unpacked_kernel
from sandyard.server.node.images.definitions import Definition, arguments_for, load_definition
from sandyard.server.node.images.kernel import NEEDS, own_kernel, refuse_lacking

VERSION = b"Linux version 6.12.118 (root@vm) (gcc (Debian 12.4.0-5) 12.4.0) #7"
ALL = {one.options[0]: "y" for one in NEEDS}
# As the kernel's own build calls them (scripts/Makefile.lib).
PACKERS = {
    "gzip": ["gzip", "-n", "-f", "-9"],
    "xz": ["xz", "--check=crc32", "--x86", "--lzma2=,dict=1MiB"],
    "lzma": ["xz", "--format=lzma", "-9"],
    "bzip2": ["bzip2", "-9"],
    "lz4": ["lz4", "-l", "-9", "-", "-"],
    "zstd": ["zstd", "-19", "-q"],
    "lzo": ["lzop", "-9"],
}


def elf(options: dict[str, str] | None = None) -> bytes:
    """Return what passes for a kernel, with a configuration in it if one is given."""
    made = b"\x7fELF" + bytes(range(256)) * 100 + VERSION
    if options is not None:
        text = "# Linux/x86 6.12\n# CONFIG_KASAN is not set\n" + "".join(
            f"CONFIG_{name}={value}\n" for name, value in options.items()
        )
        made += b"IKCFG_ST" + gzip.compress(text.encode()) + b"IKCFG_ED"
    return made + bytes(range(256)) * 100


def bzimage(payload: bytes, *, size: int | None = None) -> bytes:
    """Return a bzImage with a packed kernel in it, followed by its size, as gzip alone has it."""
    tail = b"" if size is None else struct.pack("<I", size)
    head = bytearray(0x250)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, 16, len(payload + tail))
    return bytes(head).ljust(1024, b"\0") + bytes(16) + payload + tail + b"something else"


@pytest.mark.parametrize("how", list(PACKERS))
def test_a_kernel_is_unpacked_once_however_it_is_packed(tmp_path: Path, how: str) -> None:
    command = PACKERS[how]
    if shutil.which(command[0]) is None:
        pytest.skip(f"NOT RUN: {command[0]} is not installed")
    packed = subprocess.run(command, input=elf(), capture_output=True, check=True).stdout
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(packed, size=None if how == "gzip" else len(elf())))
    found = unpacked_kernel(image, tmp_path / "cache")
    assert found.read_bytes() == elf()
    made = found.stat().st_ino
    assert unpacked_kernel(image, tmp_path / "cache").stat().st_ino == made
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [found.name]


def test_a_kernel_that_is_not_packed_is_taken_as_it_is(tmp_path: Path) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(elf())
    assert unpacked_kernel(image, tmp_path / "cache").read_bytes() == elf()


def test_without_the_program_that_unpacks_it_a_kernel_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(b"\x02\x21\x4c\x18 and more", size=3))
    with pytest.raises(UnavailableError, match="lz4 is not installed"):
        unpacked_kernel(image, tmp_path / "cache")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "neither a bzImage nor an ELF"),
        (b"x" * 2000, "neither a bzImage nor an ELF"),
        (bzimage(b"odd packing"), "not known here"),
        (bzimage(gzip.compress(b"no kernel")), "no ELF"),
        (bzimage(gzip.compress(elf())[:-20]), "cannot unpack"),
        (bzimage(b""), "not known here"),
    ],
)
def test_what_is_no_kernel_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(data)
    with pytest.raises(UnavailableError, match=match):
        unpacked_kernel(image, tmp_path / "cache")
    with pytest.raises(InvalidArgumentError, match="cannot use the kernel"):
        own_kernel(image, None)


@given(st.binary(max_size=2000), st.integers(0, 2000), st.binary(max_size=20))
@settings(max_examples=200)
def test_a_damaged_kernel_is_refused_in_words(noise: bytes, at: int, more: bytes) -> None:
    whole = bzimage(gzip.compress(elf()))
    for data in (noise, whole[:at] + more + whole[at + len(more) :], whole[: len(whole) - at]):
        with suppress(UnavailableError):
            assert unpacked(data, Path("vmlinuz")).startswith(b"\x7fELF")


def test_a_kernel_tells_its_release_and_what_is_set_in_it(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(gzip.compress(elf({"EXT4_FS": "y", "TUN": "m"}))))
    assert kernel_info(image) == KernelInfo("6.12.118", {"EXT4_FS": "y", "TUN": "m"})
    assert not kernel_info(image).has_acpi
    image.write_bytes(elf())
    assert kernel_info(image) == KernelInfo("6.12.118", None)
    assert kernel_info(image).has_acpi


def test_every_option_that_is_missing_is_named(tmp_path: Path) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(elf(ALL))
    refuse_lacking(own_kernel(image, None))
    lacking = {**ALL, "OVERLAY_FS": "m", "BRIDGE": "m"}
    del lacking["ACPI"]
    image.write_bytes(elf(lacking))
    with pytest.raises(InvalidArgumentError) as caught:
        refuse_lacking(own_kernel(image, None))
    assert "CONFIG_OVERLAY_FS" in caught.value.message
    assert "CONFIG_ACPI or CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES" in caught.value.message
    assert [one.shown for one in own_kernel(image, None).lacks(musts=False)] == ["CONFIG_BRIDGE"]
    # Either does.
    image.write_bytes(elf({**ALL, "ACPI": "n", "VIRTIO_MMIO_CMDLINE_DEVICES": "y"}))
    refuse_lacking(own_kernel(image, None))
    # A kernel that does not say what it has is believed; the probe boots it.
    image.write_bytes(elf())
    refuse_lacking(own_kernel(image, None))


def test_what_is_a_module_counts_if_modules_come_with_it(tmp_path: Path) -> None:
    image, modules = tmp_path / "vmlinux", tmp_path / "6.12.118"
    image.write_bytes(elf({**ALL, "OVERLAY_FS": "m", "TMPFS": "m"}))
    modules.mkdir()
    with pytest.raises(InvalidArgumentError, match=r"no modules\.order"):
        own_kernel(image, modules)
    (modules / "modules.order").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"no modules\.builtin"):
        own_kernel(image, modules)
    (modules / "modules.builtin").write_text("")
    kernel = own_kernel(image, modules)
    # The initramfs loads the one, and nobody loads the other in time.
    assert [one.shown for one in kernel.lacks(musts=True)] == ["CONFIG_TMPFS"]
    (modules / "overlay.ko").write_bytes(b"other")
    assert own_kernel(image, modules).digest != kernel.digest
    with pytest.raises(InvalidArgumentError, match=r"must be called 6\.12\.118"):
        own_kernel(image, modules.rename(tmp_path / "6.1"))


def test_without_acpi_what_finds_the_devices_has_to_be_built_in(tmp_path: Path) -> None:
    image, modules = tmp_path / "vmlinux", tmp_path / "6.12.118"
    modules.mkdir()
    for name in ("modules.order", "modules.builtin"):
        (modules / name).write_text("")
    options = {**ALL, "VIRTIO_MMIO": "m", "VIRTIO_MMIO_CMDLINE_DEVICES": "y"}
    image.write_bytes(elf(options))
    refuse_lacking(own_kernel(image, modules))
    del options["ACPI"]
    image.write_bytes(elf(options))
    with pytest.raises(InvalidArgumentError, match="CONFIG_VIRTIO_MMIO "):
        refuse_lacking(own_kernel(image, modules))


TEMPLATE = """slug = "one"
name = "One"
{more}description = ""
kind = "headless"
packages = []
defaults = {{ vcpus = 1, memory = "512MB", disk = "5GB" }}

[[sources]]
family = "debian"
suite = "trixie"
os = "Debian 13"
components = ["main"]
kernel = "linux-image-amd64"
"""


def template(folder: Path, more: str = "", source: str = "") -> Definition:
    path = folder / "one.toml"
    path.write_text(TEMPLATE.format(more=more) + source)
    return load_definition(path)


def test_a_kernel_in_a_template_costs_no_new_packages(tmp_path: Path) -> None:
    bare = template(tmp_path)
    found = template(tmp_path, 'kernel = "k/bzImage"\nkernel_arguments = "quiet a=b"\n')
    assert (found.kernel, found.kernel_arguments) == (tmp_path / "k/bzImage", "quiet a=b")
    assert found.digest != bare.digest
    assert found.packages_digest == bare.packages_digest
    other = template(tmp_path, source='packages = ["x"]\n')
    assert other.packages_digest != bare.packages_digest
    with pytest.raises(InvalidArgumentError, match="to be named as well"):
        template(tmp_path, 'kernel_modules = "k/6.12"\n')


@pytest.mark.parametrize(
    "arguments",
    ["x" * 1025, "ä", "a\tb", 'a="b', "-- init", "console=tty0", "sandyard.probe", "a\u0000b"],
)
def test_arguments_that_would_break_a_boot_are_refused(tmp_path: Path, arguments: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot read the template"):
        template(tmp_path, f'kernel_arguments = "{arguments}"\n')
    with pytest.raises(ValueError, match="kernel_arguments"):
        NodeSettings.model_validate({"kernel_arguments": arguments.replace("\\", "")})
    long = template(tmp_path, f'kernel_arguments = "{"x" * 600}"\n')
    assert arguments_for("y" * 400, long) == "y" * 400 + " " + "x" * 600
    with pytest.raises(InvalidArgumentError, match="together"):
        arguments_for("y" * 600, long)


def test_a_relative_kernel_is_one_in_the_home(tmp_path: Path) -> None:
    node = NodeSettings(kernel=Path("k/bzImage"), kernel_modules=Path("/m/6.12"))
    settings = Settings(home=tmp_path, node=node)
    assert settings.kernel == tmp_path / "k/bzImage"
    assert settings.kernel_modules == Path("/m/6.12")
    with pytest.raises(ValueError, match=r"set node\.kernel as well"):
        NodeSettings(kernel_modules=Path("/m/6.12"))
