"""Container images for tests, good and hostile, made with tarfile alone."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Entry(tarfile.TarInfo):
    """An entry of a layer, with its data."""

    data = b""


def file_entry(name: str, data: bytes = b"", *, mode: int = 0o644, **more: Any) -> Entry:
    """Return an entry of a layer. `more` are fields of TarInfo."""
    entry = Entry(name)
    entry.size, entry.mode, entry.data = len(data), mode, data
    for field, value in more.items():
        setattr(entry, field, value)
    return entry


def folder_entry(name: str, *, mode: int = 0o755) -> Entry:
    """Return a folder."""
    return file_entry(name, mode=mode, type=tarfile.DIRTYPE)


def link_entry(name: str, target: str, *, is_hard: bool = False) -> Entry:
    """Return a link."""
    kind = tarfile.LNKTYPE if is_hard else tarfile.SYMTYPE
    return file_entry(name, type=kind, linkname=target)


def layer(entries: Iterable[Entry]) -> bytes:
    """Return a layer."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for one in entries:
            archive.addfile(one, io.BytesIO(one.data))
    return made.getvalue()


def tree(files: Mapping[str, bytes], *, mode: int = 0o755) -> bytes:
    """Return a layer of plain files."""
    return layer(file_entry(name, data, mode=mode) for name, data in files.items())


def _config_of(
    layers: list[bytes], config: Mapping[str, Any], architecture: str = "amd64"
) -> bytes:
    return json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [_name(one) for one in layers]},
        }
    ).encode()


def oci_layout(
    layers: list[bytes],
    config: Mapping[str, Any],
    *,
    compress: Literal["", "gzip", "zstd"] = "",
    architecture: str = "amd64",
) -> dict[str, bytes]:
    """Return the files of an OCI layout with one image."""
    kind = f"{_LAYER}+{compress}" if compress else _LAYER
    packed = [(_PACKERS[compress](one), kind) for one in layers]
    return _layout(packed, _config_of(layers, config, architecture))


def several(*layouts: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of an OCI layout with the images of several."""
    whole: dict[str, bytes] = {}
    manifests: list[object] = []
    for one in layouts:
        whole |= one
        manifests += json.loads(one["index.json"])["manifests"]
    index = {"schemaVersion": 2, "manifests": manifests}
    return {**whole, "index.json": json.dumps(index).encode()}


def _zstd(data: bytes) -> bytes:
    """Return data as a frame of zstd (RFC 8878) with blocks that are not compressed."""
    pieces = [data[at : at + 131072] for at in range(0, len(data), 131072)] or [b""]
    blocks = b"".join(
        ((len(one) << 3) | (number == len(pieces) - 1)).to_bytes(3, "little") + one
        for number, one in enumerate(pieces)
    )
    return b"\x28\xb5\x2f\xfd\xa0" + len(data).to_bytes(4, "little") + blocks


_PACKERS: Mapping[str, Callable[[bytes], bytes]] = {
    "": lambda data: data, "gzip": gzip.compress, "zstd": _zstd,
}  # fmt: skip


def _layout(layers: list[tuple[bytes, str]], config: bytes) -> dict[str, bytes]:
    blobs: dict[str, bytes] = {}

    def keep(data: bytes, kind: str) -> dict[str, Any]:
        blobs[f"blobs/sha256/{hashlib.sha256(data).hexdigest()}"] = data
        return {"mediaType": kind, "digest": _name(data), "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": keep(config, _CONFIG),
        "layers": [keep(*one) for one in layers],
    }
    index = {"schemaVersion": 2, "manifests": [keep(json.dumps(manifest).encode(), _MANIFEST)]}
    return {
        **blobs,
        "index.json": json.dumps(index).encode(),
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
    }


def oci_archive(
    layers: list[bytes], config: Mapping[str, Any], *, architecture: str = "amd64"
) -> bytes:
    """Return an OCI layout in a tar archive."""
    return tree(oci_layout(layers, config, architecture=architecture), mode=0o644)


def docker_archive(
    layers: list[bytes], config: Mapping[str, Any], name: str = "made:latest"
) -> bytes:
    """Return what `docker save` writes."""
    about = _config_of(layers, config)
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": names}]
    files = dict(zip(names, layers, strict=True))
    files |= {"config.json": about, "manifest.json": json.dumps(manifest).encode()}
    return tree(files, mode=0o644)


def bomb(name: str, size_mib: int) -> bytes:
    """Return an OCI layout in a tar archive with a file of zeros, a thousand times smaller."""
    head, block = tarfile.TarInfo(name), bytes(2**20)
    head.size = size_mib * 2**20
    content, packed = hashlib.sha256(), [gzip.compress(head.tobuf())]
    content.update(head.tobuf())
    many = gzip.compress(block, 9)
    for _ in range(size_mib):
        content.update(block)
        packed.append(many)  # a file of gzip may have several members
    end = bytes(2 * tarfile.BLOCKSIZE)
    content.update(end)
    blob = b"".join((*packed, gzip.compress(end)))
    about = json.dumps(
        {
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{content.hexdigest()}"]},
        }
    ).encode()  # fmt: skip
    return tree(_layout([(blob, f"{_LAYER}+gzip")], about), mode=0o644)


def _name(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
