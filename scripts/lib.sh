# Shared by the scripts of this folder; sourced, never run.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DEPS=$ROOT/.deps
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
export ROOT DEPS TARGET

say() { printf '%s\n' "$*" >&2; }

# die MESSAGE [REMEDY]
die() {
    say "error: $1"
    [ -z "${2:-}" ] || say "  help: $2"
    exit 1
}

now_ms() { date +%s%3N; }

# since MS: the time passed since then, in seconds with one decimal
since() {
    local ms=$(($(now_ms) - $1))
    printf '%d.%d s' $((ms / 1000)) $((ms % 1000 / 100))
}

# step NAME COMMAND...: runs the command and says how long it took; its exit status is the command's
step() {
    local name=$1 start status=0
    shift
    start=$(now_ms)
    say "==> $name"
    "$@" || status=$?
    if [ "$status" -eq 0 ]; then
        say "    $name: done in $(since "$start")"
    else
        say "    $name: FAILED (status $status) after $(since "$start")"
    fi
    return "$status"
}

# need TOOL PACKAGE: in CI what is missing is installed
need() {
    command -v "$1" >/dev/null && return
    if [ -n "${CI:-}" ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$2" >/dev/null && command -v "$1" >/dev/null && return
    fi
    die "$1 is not installed" "apt-get install $2"
}

# help FILE: the comment block at the head of a script is its help text
help() { sed -n '2,/^$/{/^#/{s/^# \{0,1\}//;p}}' "$1"; }

# lock NAME: one run at a time; the lock goes with the process
lock() {
    mkdir -p "$DEPS"
    exec 9>"$DEPS/$1.lock"
    if ! flock -n 9; then
        say "waiting for another run of $1 in this checkout"
        flock 9
    fi
}

# place LINK TARGET: points the symbolic link at the target in one step, whatever was there before
place() {
    [ -d "$1" ] && [ ! -L "$1" ] && rm -rf "$1"
    ln -sfn "$2" "$1.new"
    mv -fT "$1.new" "$1"
}

# for_others: from here on cargo builds what others run, into a folder of its own: without paths of this machine
for_others() {
    export RUSTFLAGS="--remap-path-prefix=$ROOT=/ice-launch --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
    export CARGO_TARGET_DIR=$TARGET/package
}
