"""The commands that builds run in machines.

They are given to the machine's shell with their words in the environment. What they read (images,
Dockerfiles, archives) is hostile, and meets nothing but the machine, which belongs to the build.
"""

import shlex
from collections.abc import Sequence
from typing import Final

FOLDER: Final = "/var/lib/containers/build"
"""Where the builder works: on its disk itself, where an overlay may lie on it."""
UPLOAD: Final = f"{FOLDER}/upload"
DOCKERFILE: Final = f"{FOLDER}/Dockerfile"
CONFIG: Final = f"{FOLDER}/config.json"
ROOT_FILE: Final = "/run/sandyard/disk/root.erofs"
OS_FILE: Final = "/run/sandyard/disk/os-release"
COMMAND_FILE: Final = "/run/sandyard/disk/command.json"
_BUSYBOX: Final = "/run/sandyard/tools/usr/bin/busybox"

PREPARE: Final = f"set -eu\nmkdir -p {FOLDER}\n"

# First to a layout on the disk: skopeo verifies all digests, and what unpacks does not. A tag may
# move meanwhile, so everything after the first look is by digest.
FETCH_IMAGE: Final = f"""
set -eu
cd {FOLDER}
export TMPDIR={FOLDER}
from=docker://$IMAGE
amd64='--override-os linux --override-arch amd64'
skopeo $amd64 inspect --retry-times 5 --format '{{{{.Digest}}}}' "$from" >digest
case $IMAGE in
*@*) ;;
*) name=${{IMAGE##*/}}; from=docker://${{IMAGE%"$name"}}${{name%%:*}}@$(cat digest) ;;
esac
skopeo $amd64 inspect --retry-times 5 --config --raw "$from" >config.json
skopeo $amd64 copy --insecure-policy --retry-times 5 "$from" oci:image:latest
echo "digest: $(cat digest)"
"""

FETCH_UPLOAD: Final = f"""
set -eu
cd {FOLDER}
export TMPDIR={FOLDER}
kind=docker-archive:{UPLOAD}
if tar -tf {UPLOAD} 2>/dev/null | grep -qx -e oci-layout -e ./oci-layout; then
    mkdir layout
    tar -C layout -xf {UPLOAD}
    kind=oci:layout
fi
skopeo inspect --config --raw "$kind" >config.json
skopeo copy --insecure-policy "$kind" oci:image:latest
"""

UNPACK: Final = f"""
set -eu
cd {FOLDER}
umoci raw unpack --image image:latest tree
rm -rf image upload layout
"""

BUILD: Final = f"""
set -eu
cd {FOLDER}
export TMPDIR={FOLDER}
mkdir -p context
if [ -e {UPLOAD} ]; then
    tar -C context -xf {UPLOAD}
    rm {UPLOAD}
fi
hard() {{ ulimit -H "$1"; }}
buildah --storage-driver overlay bud --format docker --layers --isolation chroot --network host \\
    --ulimit "nofile=$(hard -n):$(hard -n)" --ulimit "nproc=$(hard -u):$(hard -u)" \\
    --file Dockerfile --tag build context
buildah --storage-driver overlay inspect --type image build >config.json
container=$(buildah --storage-driver overlay from --pull=never localhost/build)
ln -s "$(buildah --storage-driver overlay mount "$container")" tree
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
if [ -n "$WORKDIR" ]; then $b mkdir -p "$WORKDIR"; fi
$b chmod 1777 /tmp
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
b={_BUSYBOX}
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
{_BUSYBOX} mkdir -p /run/sandyard/pack
{_BUSYBOX} mount --bind / /run/sandyard/pack
set -- /run/sandyard/pack
{_PACK}
"""


CHECK_TOOLS: Final = "[ -x /run/sandyard/tools/usr/bin/mkfs.erofs ]"


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
