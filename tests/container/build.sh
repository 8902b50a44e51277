#!/usr/bin/env bash
# Builds both targets of the Dockerfile without a registry, and trains inside the CPU image.
#
#   sudo tests/container/build.sh              (or: make container-test)
#
# Debian's buildah (vfs storage, chroot isolation) works where containers cannot be nested, but needs root. The CPU
# target's base is made by debootstrap, and its packages are wheels that pip downloads here. The GPU target is built on a
# stand-in for NVIDIA's image, the CPU image with a constraint file: that proves the steps, not the base.
#
# Environment, all optional: PYTHON, whose pip downloads (default: python3); BASE, a tarball of a root file system with
# python3, python3-venv and ca-certificates; WHEELS, a folder of wheels for its Python; SUITE (bookworm); WORK, a folder
# to work in, which is kept.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

say() { printf '%s %s\n' "$(date +%T)" "$*"; }
fail() {
    echo "build.sh: error: $*" >&2
    exit 1
}

((EUID == 0)) || fail "needs root: chroot isolation mounts and changes owners"
for program in buildah ${BASE:-debootstrap}; do
    [[ -f $program ]] || command -v -- "$program" >/dev/null \
        || fail "$program is missing (Debian: apt-get install buildah debootstrap)"
done
if [[ -z ${WORK:-} ]]; then
    WORK=$(mktemp -d)
    trap 'rm -rf -- "$WORK"' EXIT
fi
mkdir -p -- "$WORK"
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot

in_storage() { buildah --root "$WORK/storage" --runroot "$WORK/run" "$@"; }
build() {
    in_storage build --quiet --format docker --volume "$WHEELS:/wheels:ro" --build-arg PIP_FIND_LINKS=/wheels \
        --build-arg PIP_NO_INDEX=1 "$@" . >/dev/null
}
# inside IMAGE COMMAND...: as a `docker run --rm`. Under another host name torchrun would look it up in vain.
inside() {
    local container status=0
    container=$(in_storage from "$1")
    shift
    in_storage run --hostname localhost "$container" -- "$@" || status=$?
    in_storage rm "$container" >/dev/null
    return "$status"
}

if [[ -z ${BASE:-} ]]; then
    BASE=$WORK/base.tar
    say "base: debootstrap"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        "${SUITE:-bookworm}" "$WORK/root" >"$WORK/debootstrap.log"
    tar --numeric-owner -C "$WORK/root" -cf "$BASE" .
    rm -rf -- "$WORK/root"
fi
container=$(in_storage from scratch)
in_storage add --quiet "$container" "$BASE" / >/dev/null
in_storage commit --quiet --format docker "$container" localhost/base >/dev/null
in_storage rm "$container" >/dev/null

if [[ -z ${WHEELS:-} ]]; then
    WHEELS=$WORK/wheels
    version=$(inside localhost/base python3 -c 'import sys; print("{}.{}".format(*sys.version_info))')
    say "wheels for Python $version"
    "${PYTHON:-python3}" -m pip download --quiet --only-binary :all: --python-version "$version" \
        --constraint constraints.txt --dest "$WHEELS" '.[hf,plot]' 'setuptools>=77'
fi

say "CPU target"
SECONDS=0
build --target cpu --build-arg CPU_BASE=localhost/base --tag geoscale:cpu
say "CPU target built in $SECONDS s"
[[ $(inside geoscale:cpu id -u) == 10001 ]] || fail "the CPU image runs as another user than 10001"
listing=$(inside geoscale:cpu ls -A)
for name in .git .venv runs tests; do
    ! grep -Fxq -- "$name" <<<"$listing" || fail "the CPU image holds $name"
done
say "training inside"
SECONDS=0
inside geoscale:cpu torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 pretrain.py \
    --tensor-model-parallel-size 2 --sequence-parallel --num-layers 4 --hidden-size 256 --num-attention-heads 8 \
    --group-query-attention --num-query-groups 4 --seq-length 256 --position-embedding-type rope --normalization RMSNorm \
    --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 8 --lr 2e-3 --train-iters 3 \
    --mock-data --vocab-size 1023 --eval-iters 0 --log-interval 1 --num-workers 0 --save runs/container | tee "$WORK/train.log"
grep -q "saved checkpoint at iteration *3 " "$WORK/train.log" || fail "training inside did not save iteration 3"
say "trained in $SECONDS s"

say "GPU target on a stand-in"
container=$(in_storage from geoscale:cpu)
in_storage config --workingdir / "$container"
in_storage run --user root "$container" -- sh -c '
    set -e
    pip list --format=freeze | grep -E "^(torch|numpy)==" >/etc/constraint.txt
    pip uninstall --quiet --yes megatron-geoscale megatron-core sentencepiece rich tqdm
    userdel geoscale
    rm -rf /workspace/geoscale /home/geoscale'
in_storage config --user root --env PIP_CONSTRAINT=/etc/constraint.txt "$container"
in_storage commit --quiet --format docker --rm "$container" localhost/stand-in >/dev/null
build --target gpu --build-arg GPU_BASE=localhost/stand-in --tag geoscale:gpu
[[ $(inside geoscale:gpu id -u) == 10001 ]] || fail "the GPU image runs as another user than 10001"
inside geoscale:gpu python pretrain.py --help >/dev/null || fail "pretrain.py --help fails in the GPU image"

say "sizes:"
in_storage images --format '{{.Name}}:{{.Tag}} {{.Size}}'
