#!/usr/bin/env bash
# torchmetrics decides when it is imported which process is rank 0, and does not look again.
#
# Expected: rank_zero_only, rank_zero_info and rank_zero_warn look at the rank when they are called, as the same helpers of a
# process group do, so that a process which becomes rank 1 after the import prints nothing.
# True: the module reads LOCAL_RANK once, at import; without it the rank is 0 for ever. Processes that are forked after the import,
# as by multiprocessing's fork and forkserver with preloaded modules, all count as rank 0, whatever LOCAL_RANK they are given. RANK
# is not looked at, so that on several nodes each node has a rank 0. Import it after the variables are set, or set
# rank_zero_only.rank by hand.

set -euo pipefail

readonly VERSION=1.9.0 TORCH=2.13.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$TORCH" "torchmetrics==$VERSION"

cat >"$work/rank.py" <<'PYTHON'
import os
import sys

import torchmetrics
from torchmetrics.utilities import prints

pid = os.fork()
if pid == 0:
    os.environ.update(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    called = []
    prints.rank_zero_only(lambda: called.append(True))()
    print("torchmetrics", torchmetrics.__version__)
    print(f"forked rank 1: rank_zero_only.rank is {prints.rank_zero_only.rank}, and its function is {'called' if called else 'not called'}", flush=True)
    os._exit(0 if called else 1)
if os.waitpid(pid, 0)[1] != 0:
    sys.exit("CHANGED: the rank is looked at when the function is called")
PYTHON
env --unset=RANK --unset=LOCAL_RANK "$work/venv/bin/python" "$work/rank.py"

rank=$(LOCAL_RANK=0 RANK=4 "$work/venv/bin/python" -c 'from torchmetrics.utilities.prints import rank_zero_only as only; print(only.rank)')
echo "RANK=4, LOCAL_RANK=0, set before the import: rank_zero_only.rank is $rank"
[ "$rank" = 0 ] || { echo "CHANGED: RANK counts" && exit 1; }
