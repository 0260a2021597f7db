#!/usr/bin/env bash
# Each init_process_group wraps sys.excepthook once more, and destroy_process_group does not take that back.
#
# Expected: after destroy_process_group the process is as before, so that a program may leave and form its group any number of times.
# True: the hook that puts "[rank0]:" before each line of a traceback is put around the one before it. After three groups a traceback
# has four prefixes, and after about a thousand the hook itself fails by recursion: the traceback is printed without any prefix, behind
# "Error in sys.excepthook". A program that forms groups again keeps sys.excepthook and sets it back.

set -euo pipefail

readonly VERSION=2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/groups.py" <<'PYTHON'
import sys

import torch.distributed as dist


def form():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


for _ in range(int(sys.argv[1])):
    form()
    dist.destroy_process_group()
form()
raise ValueError("the end")
PYTHON
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
prefixes() { grep -o '\[rank0\]:' <<<"$1" | wc -l; }
for groups in 0 3 1100; do
    output=$("$work/venv/bin/python" "$work/groups.py" "$groups" 2>&1 || true)
    last=$(tail -n 1 <<<"$output")
    echo "after $groups groups: $last"
    case $groups in
        0) [ "$(prefixes "$last")" = 1 ] ;;
        3) [ "$(prefixes "$last")" = 4 ] ;;
        *) [ "$(prefixes "$last")" = 0 ] && grep -q 'Error in sys.excepthook' <<<"$output" && echo "    behind: Error in sys.excepthook" ;;
    esac || {
        echo "CHANGED: groups leave other hooks behind" >&2
        exit 1
    }
done
