# Finds and installs libtorch, for this checkout and for projects outside it; sourced after lib.sh, never run.
# DEPS names the folder that libtorch is installed into.
# shellcheck shell=bash

readonly VERSION=2.13.0
# PyTorch's wheel without the CUDA libraries that the CPU does not need: 1.2 GB.
readonly SLIM=(--no-deps "torch==$VERSION" nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96)

# libtorch_version DIR: prints the version of the libtorch in DIR, nothing if there is none
libtorch_version() {
    if [ -f "$1/version.py" ]; then
        sed -n "s/^__version__ = ['\"]\(.*\)['\"].*/\1/p" "$1/version.py"
    elif [ -f "$1/build-version" ]; then
        head -n 1 "$1/build-version"
    fi
}

# usable DIR: a whole libtorch of the right version
usable() {
    [ -f "$1/lib/libtorch_cpu.so" ] && [ -d "$1/include/torch/csrc/api" ] &&
        local version && version=$(libtorch_version "$1") && [ "${version%%+*}" = "$VERSION" ]
}

# with_torch DIR: wheels with a whole libtorch
with_torch() { usable "$1/torch"; }

# install NAME CHECK REQUIREMENT...: wheels into .deps/wheels/NAME, complete or not at all; CHECK gets the folder
install() {
    local name=$1 check=$2 dir=$DEPS/wheels/$1 partial=$DEPS/wheels/$1.partial
    shift 2
    if [ -d "$dir" ]; then
        say "    already there: $dir"
        return
    fi
    need pip
    rm -rf "$partial"
    mkdir -p "${partial%/*}"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-warn-script-location --no-compile \
        --target "$partial" "$@" ||
        die "pip could not install: $*" "read pip's message above; torch $VERSION has wheels for Python 3.10 and later on Linux"
    "$check" "$partial" || die "what pip installed into $partial is not whole" "delete it and run ${0##*/} again ($name)"
    mv -T "$partial" "$dir"
    say "    $(du -sh "$dir" | cut -f1) in $dir"
}

# install_slim: what the CPU needs, behind .deps/libtorch
install_slim() {
    install slim with_torch "${SLIM[@]}"
    place "$DEPS/libtorch" wheels/slim/torch
}

# libtorch_from_environment: points .deps/libtorch at the libtorch that LIBTORCH names
libtorch_from_environment() {
    [ -d "$LIBTORCH" ] || die "LIBTORCH=$LIBTORCH is not a folder" "unset LIBTORCH, or point it at a libtorch $VERSION"
    local dir version
    dir=$(cd "$LIBTORCH" && pwd -P)
    version=$(libtorch_version "$dir")
    [ -n "$version" ] || die "LIBTORCH=$LIBTORCH holds neither version.py nor build-version, so it is no libtorch" \
        "point it at the folder that holds include/ and lib/, or unset it to have libtorch $VERSION installed"
    [ "${version%%+*}" = "$VERSION" ] || die "LIBTORCH=$LIBTORCH is libtorch $version, and $VERSION is needed" \
        "unset LIBTORCH to have $VERSION installed, or point it at one"
    usable "$dir" || die "LIBTORCH=$LIBTORCH lacks lib/libtorch_cpu.so or include/torch/csrc/api" \
        "unset LIBTORCH to have libtorch $VERSION installed, or point it at a whole one"
    [ "$(readlink -f "$DEPS/libtorch" || true)" = "$dir" ] || place "$DEPS/libtorch" "$dir"
    say "    libtorch $version from LIBTORCH: $dir"
}
