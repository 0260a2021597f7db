# Shared by the scripts of this folder; sourced, never run.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DEPS=$ROOT/.deps
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
export ROOT DEPS TARGET
# Where rustup puts it, although a shell that was started before does not know.
command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

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

# have TOOL: whether it is there. cargo must be of the release that Cargo.toml names; pip and venv are modules
# of Python; certificates are those of the system.
have() {
    case $1 in
        cargo)
            local wanted found
            wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml")
            found=$(cargo --version 2>/dev/null | cut -d' ' -f2)
            [ -n "$found" ] && printf '%s\n' "$wanted" "$found" | sort --version-sort --check=quiet
            ;;
        pip) python3 -m pip --version >/dev/null 2>&1 ;;
        venv) python3 -c 'import ensurepip, venv' >/dev/null 2>&1 ;;
        certificates)
            [ -n "${SSL_CERT_FILE:-}${SSL_CERT_DIR:-}" ] || [ -s /etc/ssl/certs/ca-certificates.crt ] ||
                [ -s /etc/pki/tls/certs/ca-bundle.crt ] || [ -s /etc/ssl/ca-bundle.pem ] || [ -s /etc/ssl/cert.pem ]
            ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

# package TOOL: Debian's package of it
package() {
    case $1 in
        pip) echo python3-pip ;;
        venv) echo python3-venv ;;
        certificates) echo ca-certificates ;;
        etcd) echo etcd-server ;;
        ip) echo iproute2 ;;
        bible) echo bible-kjv ;;
        *) echo "$1" ;;
    esac
}

# missing TOOL...: those that are not there, one per line
missing() {
    local tool
    for tool in "$@"; do have "$tool" || echo "$tool"; done
}

# root COMMAND...: runs it as root if that needs no answer from anybody
root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

# offer TOOL...: installs what is missing if that is possible without a question; whether all are there now
offer() {
    local tools packages=() tool output
    mapfile -t tools < <(missing "$@")
    [ ${#tools[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null && root true 2>/dev/null || return 1
    for tool in "${tools[@]}"; do
        # A distribution's Rust is too old.
        [ "$tool" != cargo ] || return 1
        packages+=("$(package "$tool")")
    done
    say "    installing ${packages[*]}"
    output=$({ root apt-get update -qq &&
        root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } 2>&1) || {
        say "$output"
        return 1
    }
    hash -r
    [ -z "$(missing "${tools[@]}")" ]
}

# need TOOL...: as offer; what is missing then is named in one line, with the command that installs it
need() {
    offer "$@" && return
    local tools packages=() tool names command=''
    mapfile -t tools < <(missing "$@")
    for tool in "${tools[@]}"; do
        [ "$tool" = cargo ] || packages+=("$(package "$tool")")
    done
    names=$(printf ', %s' "${tools[@]}")
    [ ${#packages[@]} -eq 0 ] || command="; as root: apt-get install ${packages[*]}"
    case " ${tools[*]} " in
        *' cargo '*) command="; Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml") or later: see https://rustup.rs$command" ;;
    esac
    say "error: not installed: ${names#, }$command"
    exit 1
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

# pip_tool NAME==VERSION...: installs tools of PyPI into .deps/tools/NAME, the first one's name, unless these versions are there
pip_tool() {
    local folder=$DEPS/tools/${1%%==*} tool missing=()
    for tool in "$@"; do [ -d "$folder/${tool/==/-}.dist-info" ] || missing+=("$tool"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    need python3 pip
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --upgrade --target "$folder" "$@" ||
        die "pip could not install $*" "read pip's message above"
}

# for_others: from here on cargo builds what others run, into a folder of its own: without paths of this machine, dated by the commit
for_others() {
    SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$ROOT" log -1 --format=%ct 2>/dev/null || echo 0)}
    export SOURCE_DATE_EPOCH
    export RUSTFLAGS="--remap-path-prefix=$ROOT=/ice-launch --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
    export CARGO_TARGET_DIR=$TARGET/package
}
