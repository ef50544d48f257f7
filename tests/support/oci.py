"""Container images for tests, good and hostile, made with tarfile alone."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

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


def _config_of(layers: list[bytes], config: Mapping[str, Any]) -> bytes:
    return json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [_name(one) for one in layers]},
        }
    ).encode()


def oci_layout(
    layers: list[bytes], config: Mapping[str, Any], *, compress: bool = False
) -> dict[str, bytes]:
    """Return the files of an OCI layout with one image."""
    packed = [
        (gzip.compress(one), f"{_LAYER}+gzip") if compress else (one, _LAYER) for one in layers
    ]
    return _layout(packed, _config_of(layers, config))


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


def oci_archive(layers: list[bytes], config: Mapping[str, Any]) -> bytes:
    """Return an OCI layout in a tar archive."""
    return tree(oci_layout(layers, config), mode=0o644)


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
