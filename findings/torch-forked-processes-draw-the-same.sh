#!/usr/bin/env bash
# Processes forked from one that has imported PyTorch draw the same random numbers, and those of another start draw others.
#
# Expected: a program that sets no seed draws the same numbers each time, or else each process draws its own.
# True: libtorch seeds its generator from the system when it is loaded, not when it is first used and not with a fixed number. So two
# runs differ, and all processes that are forked after the import draw one sequence: dropout masks and noise of all ranks are equal.
# random of the standard library is seeded again in each forked process, and numpy.random is not. A forked process calls
# torch.default_generator.seed() and numpy.random.seed().

set -euo pipefail

readonly VERSION=2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/draw.py" <<'PYTHON'
import os
import random
import sys

import numpy
import torch


def drawn(work):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, work().hex().encode())
        os._exit(0)
    os.close(writer)
    return os.read(reader, 100)


def seeded():
    torch.default_generator.seed()
    return torch.rand(1).item()


same = {
    "torch": drawn(lambda: torch.rand(1).item()) == drawn(lambda: torch.rand(1).item()),
    "numpy": drawn(numpy.random.rand) == drawn(numpy.random.rand),
    "random": drawn(random.random) == drawn(random.random),
    "torch, seeded again": drawn(seeded) == drawn(seeded),
}
print(torch.rand(1).item().hex(), same, file=sys.stderr)
print(torch.rand(1).item().hex())
if same != {"torch": True, "numpy": True, "random": False, "torch, seeded again": False}:
    sys.exit("CHANGED: forked processes draw otherwise")
PYTHON
one=$("$work/venv/bin/python" "$work/draw.py")
other=$("$work/venv/bin/python" "$work/draw.py")
[ "$one" != "$other" ] || {
    echo "CHANGED: two starts draw the same"
    exit 1
}
