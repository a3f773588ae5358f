#!/usr/bin/env bash
# Builds the image of one target and proves that it serves as it will in a cluster: no root, no capability, no writable
# root file system. Needs buildah, podman and runc, and the right to run containers; no engine.
#
#   deploy/check_image.sh [TARGET]            TARGET: cpu (default)
#
# BASE names the base image (default python:3.11-slim). Where no image registry can be reached, set STAND_IN=1: a Debian
# with Python is made by debootstrap from the machine's own package source and used under that name.
# PYTHON is a Python with onnx and numpy, which makes the model (default: .venv/bin/python).
# KEEP=1 leaves the container running.
set -euo pipefail
cd "$(dirname "$0")/.."

TARGET=${1:-cpu}
BASE=${BASE:-python:3.11-slim}
IMAGE=localhost/slipstream:check-$TARGET
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-18000}
CACHE=$PWD/.cache/image
NAME=slipstream-check-$$
mkdir -p "$CACHE"
SCRATCH=$(mktemp -d)

fail() { echo "check_image: $*" >&2; exit 1; }
for tool in buildah podman runc; do
    command -v "$tool" >/dev/null || fail "$tool is missing; on Debian: apt-get install buildah podman runc catatonit"
done

stop() {
    if [[ -z ${KEEP:-} ]]; then
        podman rm --force --time 10 "$NAME" >/dev/null 2>&1 || true
        rm -rf "$SCRATCH"
    fi
}
trap stop EXIT

# One storage for both tools; cgroupfs and runc work where there is no systemd; the limits are those that a root without
# CAP_SYS_RESOURCE may set.
printf '[storage]\ndriver = "overlay"\ngraphroot = "/var/lib/containers/storage"\nrunroot = "/run/containers/storage"\n' \
    >"$CACHE/storage.conf"
printf '[containers]\ndefault_ulimits = ["nofile=20000:20000","nproc=4096:4096"]\n[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n' \
    >"$CACHE/containers.conf"
export CONTAINERS_STORAGE_CONF=$CACHE/storage.conf CONTAINERS_CONF=$CACHE/containers.conf

make_stand_in() {
    buildah images --format '{{.Name}}:{{.Tag}}' | grep -qx "localhost/$BASE" && return
    command -v debootstrap >/dev/null || fail "debootstrap is missing"
    local source rootfs=$CACHE/rootfs container
    # shellcheck disable=SC2016  # the placeholder is apt's
    source=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)
    if [[ ! -x $rootfs/usr/bin/python3 ]]; then
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$rootfs" "$source" >/dev/null
    fi
    ln -sf python3 "$rootfs/usr/bin/python"
    container=$(buildah from scratch)
    buildah add -q "$container" "$rootfs" / >/dev/null
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 "$container"
    buildah commit -q --rm "$container" "localhost/$BASE" >/dev/null
}

# pip inside the build reaches its index with the certificates and the settings of this machine; neither stays in the image.
build() {
    local certificates=${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$SCRATCH/pip.conf"
    buildah build --isolation chroot --format docker --layers --pull="${PULL:-missing}" \
        --volume "$certificates:/etc/ssl/certs/ca-certificates.crt:ro" --volume "$SCRATCH/pip.conf:/etc/pip.conf:ro" \
        --build-arg "BASE=$BASE" --file deploy/Dockerfile --target "$TARGET" --tag "$IMAGE" .
}

start() {
    mkdir -p "$SCRATCH/models/mlp/1"
    "$PYTHON" -c "import sys; from pathlib import Path; from tests.models import save_mlp; save_mlp(Path(sys.argv[1]))" \
        "$SCRATCH/models/mlp/1/model.onnx"
    chmod -R a+rX "$SCRATCH"
    podman run --detach --pull=never --name "$NAME" --network host --read-only --read-only-tmpfs=false \
        --tmpfs /tmp:rw,noexec,nosuid,size=64m --cap-drop ALL --security-opt no-new-privileges --memory 512m \
        --env SLIPSTREAM_PORT="$PORT" --env SLIPSTREAM_GPU=off --volume "$SCRATCH/models:/models:ro" "$IMAGE" >/dev/null
    for _ in $(seq 100); do
        curl --silent --fail --output /dev/null "http://127.0.0.1:$PORT/v2/health/ready" && return
        [[ $(podman inspect --format '{{.State.Running}}' "$NAME") == true ]] || break
        sleep 0.3
    done
    podman logs "$NAME" >&2
    fail "the container did not become ready"
}

# Asked for once: podman's own timer for it needs systemd, and complains where there is none.
check_health() { podman healthcheck run "$NAME" >/dev/null || fail "HEALTHCHECK reports the running server as unhealthy"; }

inside() { podman exec "$NAME" "$@"; }

check_confinement() {
    [[ $(inside id -u) == 10001 ]] || fail "the server runs as user $(inside id -u)"
    inside grep -q 'CapEff:[[:space:]]*0000000000000000' /proc/1/status || fail "the server has capabilities"
    ! inside touch /opt/slipstream/written 2>/dev/null || fail "the root file system is writable"
    for tool in gcc cc g++ make pip pip3 git; do
        ! inside sh -c "command -v $tool" >/dev/null || fail "the image holds $tool"
    done
    ! inside python -c "import pip" 2>/dev/null || fail "pip can be imported"
    ! inside python -c "import onnx" 2>/dev/null || fail "the serving image holds onnx"
}

check_inference() {
    "$PYTHON" - "$SCRATCH" <<'REQUEST'
import json, sys
body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 64], "data": [0.5] * 128}]}
open(sys.argv[1] + "/request.json", "w").write(json.dumps(body))
REQUEST
    local answer
    answer=$(curl --silent --show-error --fail --header 'Content-Type: application/json' \
        --data "@$SCRATCH/request.json" "http://127.0.0.1:$PORT/v2/models/mlp/infer")
    "$PYTHON" -c "import json, sys; o = json.loads(sys.argv[1])['outputs'][0]; assert o['shape'] == [2, 10], o" "$answer" \
        || fail "unexpected answer: $answer"
}

check_stop() {
    podman stop --time 60 "$NAME" >/dev/null
    local code
    code=$(podman inspect --format '{{.State.ExitCode}}' "$NAME")
    [[ $code == 0 ]] || fail "the server left with exit code $code after SIGTERM"
}

if [[ -n ${STAND_IN:-} ]]; then PULL=never; make_stand_in; fi
build
echo "$IMAGE: $(($(podman image inspect --format '{{.Size}}' "$IMAGE") / 1000000)) MB"
if [[ $TARGET == optimizer ]]; then
    podman run --rm --pull=never --network none --read-only --cap-drop ALL "$IMAGE" optimize --help >/dev/null
    echo "check_image: $TARGET starts"
    exit 0
fi
start
check_health
check_confinement
check_inference
[[ -n ${KEEP:-} ]] || check_stop
echo "check_image: $TARGET serves as uid 10001, read-only, without capabilities"
