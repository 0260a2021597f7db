#!/usr/bin/env bash
# A flag that two ranks all-reduce over gloo, and that both always set, is false after the eighth time.
#
# Expected: torch.distributed.all_reduce of a bool tensor, whose default operation is SUM, is a logical or, as it is
# over NCCL, where PyTorch turns SUM of bools into MAX, and as it is for `torch.add` of two bool tensors. A job that
# asks "does any rank want to stop?" this way works with every number of ranks.
# True: gloo gets the type uint8 for bool and adds bytes. Two `true` are the byte 2, which prints as True; a flag that
# is reduced again and again doubles each time, and the eighth sum is the byte 0: False, although every rank has only
# ever said true; so would one sum over 256 ranks. NumPy, which shares the memory, keeps the byte as well. MAX, or integers, are right.
#
# Runs two processes of torch's own, on the loopback interface.

set -euo pipefail

readonly VERSION=2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/reduce.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(index, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    bytes_of = {}
    for name, operation in ("SUM", dist.ReduceOp.SUM), ("MAX", dist.ReduceOp.MAX):
        flag = torch.tensor([True])
        bytes_of[name] = []
        for _ in range(8):
            dist.all_reduce(flag, operation)
            bytes_of[name].append(flag.view(torch.uint8).item())
        bytes_of[name].append(flag.item())
    dist.destroy_process_group()
    if index == 0:
        added = torch.tensor([True]) + torch.tensor([True])
        print(f"torch {torch.__version__}")
        print(f"bytes after each of eight all_reduce, and the last value: {bytes_of}")
        print(f"byte of torch.add: {added.view(torch.uint8).item()}")
        expected = {"SUM": [2, 4, 8, 16, 32, 64, 128, 0, False], "MAX": [1] * 8 + [True]}
        if bytes_of != expected or added.view(torch.uint8).item() != 1:
            sys.exit("CHANGED: gloo no longer adds bools as bytes")


if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), 2)
PYTHON
"$work/venv/bin/python" "$work/reduce.py" "$work"
