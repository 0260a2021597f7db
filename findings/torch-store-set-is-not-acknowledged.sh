#!/usr/bin/env bash
# TCPStore.set returns before the server has the value, and the first set after the server's death is no error.
#
# Expected: a set that has returned is stored, like an add or a compare_set, so that it can be followed by a message to another
# process, or by the end of this one.
# True: set and multi_set send and wait for no answer (add and compare_set wait). While the server's process is stopped they return
# at once. After its death the first set of a connection succeeds, and only the next operation fails: a last word that is written
# this way can be lost in silence. Follow a set that must arrive by an operation that answers, such as check, on the same client.

set -euo pipefail

readonly VERSION=2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/set.py" <<'PYTHON'
import datetime
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

reader, writer = os.pipe()
server = os.fork()
if server == 0:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, str(store.port).encode())
    time.sleep(600)
port = int(os.read(reader, 10))
client, other, third = (
    dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=5)) for _ in range(3)
)
client.set("key", "old")
assert client.get("key") == b"old"
other.get("key"), third.get("key")

print("torch", torch.__version__)
os.kill(server, signal.SIGSTOP)
client.set("key", "new")
print("a set returned while the server's process was stopped")
added = threading.Thread(target=lambda: other.add("number", 1))
added.start()
added.join(1)
answers = added.is_alive()
print(f"an add {'waits' if answers else 'returned, too'}")
os.kill(server, signal.SIGCONT)
added.join()

os.kill(server, signal.SIGKILL)
os.waitpid(server, 0)
outcomes = []
for _ in range(2):
    try:
        third.set("last", "word")
        outcomes.append("succeeded")
    except dist.DistNetworkError:
        outcomes.append("failed")
print(f"two sets after the server's death: {', '.join(outcomes)}")
if not answers or outcomes != ["succeeded", "failed"]:
    sys.exit("CHANGED: other operations are acknowledged")
PYTHON
"$work/venv/bin/python" "$work/set.py" 2>/dev/null
