"""The commands that builds run in machines.

They are given to the machine's shell with their words in the environment. What they read (images,
Dockerfiles, archives) is hostile, and meets nothing but the machine, which belongs to the build.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sandyard.server.service.builds import archive

FOLDER: Final = "/var/lib/containers/build"
"""Where the builder works: on its disk itself, where an overlay may lie on it."""
UPLOAD: Final = f"{FOLDER}/upload"
DOCKERFILE: Final = f"{FOLDER}/Dockerfile"
CONFIG: Final = f"{FOLDER}/config.json"
AUTH_FILE: Final = "/run/build/auth.json"
"""Credentials for a registry: in memory, and never in what is packed."""
SECRETS: Final = "/run/secrets"
"""The folder of the build's secrets: in memory, too."""
ROOT_FILE: Final = "/run/sandyard/disk/root.erofs"
OS_FILE: Final = "/run/sandyard/disk/os-release"
COMMAND_FILE: Final = "/run/sandyard/disk/command.json"
_COPY_FOLDER: Final = "/run/sandyard/disk/copy"
LOGIN_FILE: Final = "/run/sandyard/disk/login"
ARCHIVE: Final = f"{_COPY_FOLDER}/archive"
"""Where the archive of a COPY is put."""
BUSYBOX: Final = "/run/sandyard/tools/usr/bin/busybox"
"""The programs that every machine has, whatever its template lacks."""

_FIRST_PLATFORM: Final = """
import json, sys
every = [one.get("platform") or {} for one in json.load(sys.stdin)["manifests"]]
json.dump(next(one for one in every if one.get("os") not in (None, "unknown")), sys.stdout)
"""

PREPARE: Final = f"set -eu\nmkdir -p {FOLDER}\n"

# A tag may move meanwhile, so everything after the first look is by digest. skopeo verifies all
# digests of what it fetches. Layers stay as they are: to compress them, or to hash them once more,
# takes minutes on an emulated processor.
FIND_IMAGE: Final = f"""
set -eu
cd {FOLDER}
export TMPDIR={FOLDER}
from=docker://$IMAGE
amd64='--override-os linux --override-arch amd64'
if ! skopeo $amd64 inspect --retry-times 5 --format '{{{{.Digest}}}}' "$from" >digest 2>why; then
    cat why >&2
    grep -q 'no image found in' why || exit 1
    # Of another platform alone: an entry of its index names that as a configuration does.
    skopeo inspect --retry-times 5 --raw "$from" | python3 -I -c {shlex.quote(_FIRST_PLATFORM)} \\
        >config.json
    exit 0
fi
case $IMAGE in
*@*) ;;
*) name=${{IMAGE##*/}}; from=docker://${{IMAGE%"$name"}}${{name%%:*}}@$(cat digest) ;;
esac
skopeo $amd64 inspect --retry-times 5 --config --raw "$from" >config.json
echo "$from" >from
echo "digest: $(cat digest)"
"""

PULL_IMAGE: Final = f"""
set -eu
cd {FOLDER}
export TMPDIR={FOLDER}
skopeo --override-os linux --override-arch amd64 copy --insecure-policy --retry-times 5 \\
    --format oci "$(cat from)" dir:image
skopeo inspect --format '{{{{range .Layers}}}}{{{{println .}}}}{{{{end}}}}' dir:image |
    sed -n 's/^sha256:/image\\//p' >layers
"""

FETCH_UPLOAD: Final = f"""
set -eu
cd {FOLDER}
mkdir image
tar -C image -b 512 -xf {UPLOAD}
rm {UPLOAD}
python3 -I -c {shlex.quote(Path(archive.__file__).read_text())}
"""

# A layer is unpacked by a tar inside the tree: a link that an earlier layer made leads to where it
# will lead later. From a file and in large blocks: a pipe takes four times as long when it is
# emulated. tar's --recursive-unlink would empty every folder that a layer names again.
_UNPACK = r"""
set -eu
cd @FOLDER@
export LC_ALL=C
mkdir -p tree/.sandyard
cp @BUSYBOX@ tree/.sandyard/busybox
cp -L /usr/bin/tar $(ldd /usr/bin/tar | grep -o '/[^ ]*') tree/.sandyard
within() { chroot tree /.sandyard/"$@"; }
extract() {
    within ld-linux-x86-64.so.2 --library-path /.sandyard /.sandyard/tar --extract --file=- \
        --quoting-style=escape --blocking-factor=512 --absolute-names --numeric-owner \
        --preserve-permissions --xattrs --xattrs-include='*' --exclude='.wh.*' \
        --warning=no-timestamp <"$layer"
}
remove='
b=/.sandyard/busybox
while IFS= read -r one; do
    case $one in *\\*) one=$(printf "%b." "$one") one=${one%.} ;; esac
    name=${one##*/} folder=/${one%"$name"}
    case $name in
    .wh..wh..opq)
        [ ! -d "$folder" ] ||
            $b find "$folder" -mindepth 1 -maxdepth 1 ! -name .sandyard -exec $b rm -rf {} + ;;
    .wh..wh.* | .wh. | .wh.. | .wh...) ;;
    .wh.*) $b rm -rf "$folder${name#.wh.}" ;;
    *) $b rm -rf "/$one" ;;
    esac
done'
while read -r layer; do
    case $(od -An -tx1 -N4 "$layer") in
    " 1f 8b"*) pigz -dc "$layer" >layer; layer=layer ;;
    " 28 b5 2f fd") zstd -qdc "$layer" >layer; layer=layer ;;
    esac
    tar --list --file="$layer" --blocking-factor=512 --absolute-names \
        --quoting-style=escape >names
    # What it hides of the layers before it goes first.
    if grep -E '(^|/)\.wh\.[^/]*$' names >hidden; then within busybox sh -c "$remove" <hidden; fi
    if ! extract 2>errors; then  # a file does not take the place of a folder that has files
        sed -n 's/^[^:]*tar: \(.*\): Cannot .*: File exists$/\1/p' errors | sed 's/\\:/:/g' >hidden
        [ -s hidden ] || { cat errors >&2; exit 1; }
        within busybox sh -c "$remove" <hidden
        extract
    fi
done <layers
rm -rf tree/.sandyard image layer layers names hidden errors
"""
UNPACK: Final = _UNPACK.replace("@FOLDER@", FOLDER).replace("@BUSYBOX@", BUSYBOX)

BUILD: Final = f"""
set -eu
cd {FOLDER}
export TMPDIR={FOLDER}
mkdir -p context
if [ -e {UPLOAD} ]; then
    tar -C context -xf {UPLOAD}
    rm {UPLOAD}
fi
set --
for one in {SECRETS}/*; do
    [ ! -f "$one" ] || set -- "$@" --secret "id=${{one##*/}},src=$one"
done
if [ -n "$FORCE" ]; then set -- "$@" --no-cache --pull-always; fi
hard() {{ ulimit -H "$1"; }}
buildah --storage-driver overlay bud --format docker --layers --isolation chroot --network host \\
    --ulimit "nofile=$(hard -n):$(hard -n)" --ulimit "nproc=$(hard -u):$(hard -u)" \\
    "$@" --iidfile image-id --file Dockerfile --tag build context
buildah --storage-driver overlay inspect --type image build >config.json
# The format of OCI has no ONBUILD, which is for builds on this image: `from` would run it here.
store='[overlay@/var/lib/containers/storage+/run/containers/storage]'
skopeo copy --quiet --insecure-policy --format oci \\
    "containers-storage:${{store}}localhost/build" "containers-storage:${{store}}localhost/plain"
container=$(buildah --storage-driver overlay from --pull=never localhost/plain)
ln -s "$(buildah --storage-driver overlay mount "$container")" tree
"""

# What is left are the layers of images. They are kept with the machine, so nothing else should be.
KEEP_LAYERS: Final = f"""
set -eu
buildah --storage-driver overlay rm --all >/dev/null
buildah --storage-driver overlay rmi localhost/plain >/dev/null 2>&1 || true
rm -rf {FOLDER} {ROOT_FILE} {OS_FILE} {COMMAND_FILE}
set -- $(df -P /var/lib/containers | tail -n 1)
if [ "${{5%%%}}" -gt 50 ]; then
    echo "half of the disk is used; the next build begins without these layers"
    exit 1
fi
sync
echo 3 >/proc/sys/vm/drop_caches
"""

# What every machine has is added, and what belongs to this one is removed. It happens inside the
# tree, so that its links lead to where they will lead later.
_INSIDE = """
set -eu
b=/.sandyard/busybox
for one in proc sys dev run tmp; do
    [ ! -L "/$one" ] || $b rm "/$one"  # something is mounted there
done
for one in proc sys dev run tmp etc root workspace usr/lib/sandyard; do
    [ -d "/$one" ] || $b mkdir -p "/$one"
done
case $WORKDIR in /*) $b mkdir -p "$WORKDIR" ;; esac
$b chmod 1777 /tmp
# Programs that look up their own user fail without an entry.
[ -e /etc/passwd ] || $b printf 'root:x:0:0:root:/root:/bin/sh\\n' >/etc/passwd
[ -e /etc/group ] || $b printf 'root:x:0:\\n' >/etc/group
$b rm -rf /etc/resolv.conf /etc/machine-id /etc/hostname /etc/inittab
# That of a base is its own, and goes on unless there is another; an image's would be a forged one.
[ "$KEEPS" = 1 ] || $b rm -rf /usr/lib/sandyard/command.json
$b printf 'nameserver 172.16.0.1\\noptions timeout:3 attempts:2\\n' >/etc/resolv.conf
$b printf '' >/etc/machine-id
$b printf 'sandbox\\n' >/etc/hostname
if [ -s /.sandyard/command.json ]; then
    $b rm -rf /usr/lib/sandyard/command.json
    $b cat /.sandyard/command.json >/usr/lib/sandyard/command.json
fi
if [ -d /home/user ]; then $b chown 1000:1000 /workspace; fi
if [ -r /etc/os-release ]; then $b head -c 4096 /etc/os-release >/.sandyard/os-release; fi
"""

_PACK = f"""
set -eu
tree=$1
b={BUSYBOX}
$b rm -rf "$tree/.sandyard"
$b mkdir "$tree/.sandyard"
$b cp $b "$tree/.sandyard/busybox"
if [ -e {COMMAND_FILE} ]; then $b cp {COMMAND_FILE} "$tree/.sandyard/command.json"; fi
$b chroot "$tree" /.sandyard/busybox sh -c {shlex.quote(_INSIDE)}
$b cat "$tree/.sandyard/os-release" >{OS_FILE} 2>/dev/null || $b true
$b rm -rf "$tree/.sandyard" {ROOT_FILE}
$b mount --bind "$tree" /run/sandyard/tools/tmp
$b chroot /run/sandyard/tools /usr/bin/mkfs.erofs --quiet /proc/1/root{ROOT_FILE} /tmp
"""

PACK_TREE: Final = f'set -eu\nset -- "$(readlink -f {FOLDER}/tree)"\n{_PACK}'
PACK_SELF: Final = f"""
set -eu
{BUSYBOX} mkdir -p /run/sandyard/pack
{BUSYBOX} mount --bind / /run/sandyard/pack
set -- /run/sandyard/pack
{_PACK}
"""


CHECK_TOOLS: Final = "[ -x /run/sandyard/tools/usr/bin/mkfs.erofs ]"


TELL_LOGIN: Final = f"{BUSYBOX} env -0 >{LOGIN_FILE}"

# The busybox of the tools disk is used because an image may lack these commands.
_FOLDERS = f"""
set -eu
b={BUSYBOX}
case $TARGET in
"~" | "~/"*)
    home=$($b awk -F: -v "who=${{WHO%%:*}}" '$1 == who || $3 == who {{ print $6; exit }}' \\
        /etc/passwd)
    TARGET=${{home:-/}}${{TARGET#"~"}}
    ;;
esac
make() {{  # a folder, and what lacks above it, as $OWNER's
    [ ! -d "$1" ] || return 0
    new=$1
    while up=$($b dirname "$new"); [ ! -d "$up" ]; do new=$up; done
    $b mkdir -p "$1"
    $b chown -R "$OWNER" "$new"
}}
"""

MAKE_WORKDIR: Final = f'{_FOLDERS}\nmake "$TARGET"\n'

ADD_USER: Final = f"""
set -eu
b={BUSYBOX}
name=${{NAME%%:*}}
case $name in *[!0-9]*) ;; *) exit 0 ;; esac  # a number needs no entry
found=$($b awk -F: -v "who=$name" '$1 == who {{ print 1; exit }}' /etc/passwd)
if [ -z "$found" ]; then
    shell=/bin/sh
    [ ! -x /bin/bash ] || shell=/bin/bash
    if command -v useradd >/dev/null; then
        useradd --create-home --shell "$shell" -- "$name"
    elif command -v adduser >/dev/null; then
        adduser -D -s "$shell" "$name"
    else
        $b adduser -D -s "$shell" "$name"
    fi
fi
if [ "$SUDO" = true ] && [ -d /etc/sudoers.d ]; then
    file=/etc/sudoers.d/90-$(echo "$name" | $b tr . _)  # sudo ignores names with a dot
    echo "$name ALL=(ALL:ALL) NOPASSWD: ALL" >"$file"
    $b chmod 440 "$file"
fi
"""

# As with COPY in a Dockerfile: of a folder the contents, into what is there.
COPY: Final = f"""
{_FOLDERS}
cd {_COPY_FOLDER}
tar=tar
command -v tar >/dev/null || tar="$b tar"
$b rm -rf tree
$b mkdir tree
$tar -C tree -xf archive
$b rm archive
from=tree/$SOURCE
if [ ! -e "$from" ] && [ ! -L "$from" ]; then
    echo "there is no $SOURCE in what was uploaded"
    exit 1
fi
$b chown -R -h "$OWNER" "$from"
if [ -n "$MODE" ] && [ ! -L "$from" ]; then $b chmod -R "$MODE" "$from"; fi
if [ -d "$from" ] && [ ! -L "$from" ]; then
    make "$TARGET"
    # A file takes the place of a link to one; a link to a folder is followed.
    if $tar --version 2>/dev/null | grep -q GNU; then
        $tar -C "$from" -cf - . | \
            $tar -C "$TARGET" --keep-directory-symlink --no-overwrite-dir -xpf -
    else
        $b cp -a "$from/." "$TARGET"
    fi
else
    case $TARGET in */) make "$TARGET" ;; *) make "$($b dirname "$TARGET")" ;; esac
    $b mv -f "$from" "$TARGET"
fi
cd /
$b rm -rf {_COPY_FOLDER}
"""


def install(kind: str, names: Sequence[str]) -> str:
    """Return the command that installs packages with apt, pip or npm."""
    words = " ".join(shlex.quote(one) for one in names)
    match kind:
        case "apt":
            return (
                "export DEBIAN_FRONTEND=noninteractive; apt-get update && "
                f"apt-get install -y --no-install-recommends -- {words} && "
                "rm -rf /var/lib/apt/lists/*"
            )
        case "pip":
            return (
                "PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore "
                f"python3 -m pip install --no-cache-dir -- {words}"
            )
        case "npm":
            return f"npm install --global --no-fund --no-audit -- {words}"
        case _:
            raise AssertionError(kind)
