#!/usr/bin/env bash
# torch.distributed._reconfigure with a set of handles gives ranks other numbers from 11 ranks on, although none joined or left.
#
# Expected: a set "lets the backend choose the rank assignment", and gloo's handles begin with the rank, so that ranks
# which stay keep their numbers; at 2, 4 and 8 ranks they do.
# True: gloo sorts the handles as text. From 11 ranks on, "gloo:10:..." comes before "gloo:2:...", and every call permutes the
# ranks again. Samplers, shards and log files that go by get_rank() then belong to another process after each round, without an error.
# A list keeps the order in which it is given.

set -euo pipefail

readonly VERSION=2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/reconfigure.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist

ROUNDS = 3


def serve(pipe):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(pipe, str(server.port).encode())
    server.wait(["over"])
    os._exit(0)


def run_rank(port, size, rank, kind):
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, enable_reconfigure=True)
    numbers = []
    for turn in range(1, ROUNDS + 1):
        store.set(f"{turn}/{rank}", dist._get_reconfigure_handle())
        handles = kind(store.get(f"{turn}/{other}").decode() for other in range(size))
        dist._reconfigure(uuid=turn, handles=handles).wait()
        numbers.append(dist.get_rank())
    store.set(f"numbers/{rank}", " ".join(map(str, numbers)))
    os._exit(0)


def rounds(size, kind):
    """The numbers of each rank after each round in which the same ranks take part."""
    reader, writer = os.pipe()
    server = os.fork()
    if server == 0:
        serve(writer)
    port = int(os.read(reader, 10))
    ranks = []
    for rank in range(size):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            run_rank(port, size, rank, kind)
    for rank in ranks:
        os.waitpid(rank, 0)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    numbers = [store.get(f"numbers/{rank}").decode() for rank in range(size)]
    store.set("over", "1")
    os.waitpid(server, 0)
    return numbers


print("torch", torch.__version__, flush=True)
stays = {}
for size, kind in ((10, set), (11, set), (11, list)):
    numbers = rounds(size, kind)
    moved = [rank for rank in range(size) if set(numbers[rank].split()) != {str(rank)}]
    stays[size, kind] = not moved
    print(f"{size} ranks, a {kind.__name__}: {len(moved)} of them changed their number", flush=True)
    for rank in moved[:3]:
        print(f"    rank {rank} became {numbers[rank]}", flush=True)
if stays != {(10, set): True, (11, set): False, (11, list): True}:
    sys.exit("CHANGED: sets of handles are ordered in another way")
PYTHON
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/reconfigure.py"
