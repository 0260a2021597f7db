#!/usr/bin/env bash
# A Rust program survives the first SIGSEGV that another process sends it.
#
# Expected: `kill -SEGV` ends a program that has no handler of its own for it, with a core dump if one is
# allowed. Supervisors and test harnesses use it to simulate a crash.
# True: Rust's standard library installs a handler for SIGSEGV and SIGBUS in every program, to report stack
# overflows. For any other address it restores the default action and returns, so that the faulting
# instruction faults again. A signal from kill(2) has no faulting instruction: the program carries on, and
# only the next SIGSEGV ends it. SIGABRT and SIGILL end it at once.
#
# Runs ruff, a Rust program from PyPI, as a language server that waits for its client, and Python next to it.

set -euo pipefail

readonly VERSION=0.14.0
work=$(mktemp -d)
server='' python=''
finish() {
    for pid in $server $python; do
        kill -KILL "$pid" && wait "$pid"
    done 2>/dev/null
    rm -rf "$work"
}
trap finish EXIT

python3 -m pip install --quiet --disable-pip-version-check --target "$work/site" "ruff==$VERSION" 2>/dev/null
"$work/site/bin/ruff" --version
mkfifo "$work/stdin"

# caught PID: whether the process has a handler for SIGSEGV, signal 11
caught() {
    local mask
    mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status")
    (((0x$mask >> 10) & 1))
}

"$work/site/bin/ruff" server <"$work/stdin" >/dev/null 2>&1 &
server=$!
exec 3>"$work/stdin"
until caught $server; do sleep 0.01; done
kill -SEGV $server
# The handler has run once it has given its place to the default action.
while caught $server; do sleep 0.01; done
if [ "$(cut -d' ' -f3 "/proc/$server/stat")" = Z ]; then
    echo "CHANGED: ruff $VERSION has ended after one SIGSEGV"
    exit 1
fi
echo "ruff $VERSION: alive after SIGSEGV, which it does not handle any more"

python3 -c 'import time; time.sleep(600)' &
python=$!
kill -SEGV $python
status=0
wait $python 2>/dev/null || status=$?
python=''
echo "Python: ended with $status"
[ "$status" -eq 139 ] || {
    echo "CHANGED: Python does not end with 128 + 11"
    exit 1
}
