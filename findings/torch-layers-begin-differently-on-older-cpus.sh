#!/usr/bin/env bash
# With one seed, torch.rand gives the same numbers on all x86 processors, and the layers that draw from it do not.
#
# Expected: two hosts with the same torch and the same seed make the same model: torch.rand, torch.randperm and dropout
# give the same bits on both, and Linear and Conv2d begin with uniform numbers from the same generator.
# True: torch.rand and dropout agree to the bit, but Tensor.uniform_ with bounds other than 0 and 1, which the layers
# begin with, and torch.randn, which embeddings begin with, differ in the last bits between processors with and without AVX2: the
# kernels for AVX2 and AVX-512, which agree with each other, round once where the plain kernel rounds twice. DistributedDataParallel
# hides it, since it sends rank 0's parameters to all. Hashes of initial weights, sharded initialisation without a broadcast,
# and tests that compare with recorded weights do not: record on the kind of processor that compares, or set ATEN_CPU_CAPABILITY.
#
# ATEN_CPU_CAPABILITY=default runs the kernels that torch takes on processors without AVX2.

set -euo pipefail

readonly VERSION=2.15.0
grep -qw avx2 /proc/cpuinfo || {
    echo "this processor has no AVX2: nothing to compare" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/draw.py" <<'PYTHON'
import sys

import numpy as np
import torch

draws = {
    "rand": lambda: torch.rand(10000),
    "randperm": lambda: torch.randperm(10000),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(10000), 0.1),
    "uniform_(-0.1, 0.1)": lambda: torch.empty(10000).uniform_(-0.1, 0.1),
    "randn": lambda: torch.randn(10000),
    "Linear(100, 100)": lambda: torch.nn.Linear(100, 100).weight.detach(),
    "Conv2d(16, 32, 3)": lambda: torch.nn.Conv2d(16, 32, 3).weight.detach(),
}
drawn = {}
for name, draw in draws.items():
    torch.manual_seed(0)
    drawn[name] = draw().numpy()
np.savez(sys.argv[1], **drawn)
PYTHON
cat >"$work/compare.py" <<'PYTHON'
import sys

import numpy as np

plain, vector = (np.load(file) for file in sys.argv[1:])
differs = {}
for name in plain.files:
    a, b = plain[name], vector[name]
    share = np.mean(a != b)
    differs[name] = bool(share)
    print(f"{name:20} {100 * share:5.1f} % of the numbers differ, by {np.abs(a - b).max():.2g} at most")
same = {"rand", "randperm", "dropout"}
if any(differs[name] == (name in same) for name in differs):
    sys.exit("CHANGED: other draws than before depend on the processor")
PYTHON
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
for capability in default avx2; do
    ATEN_CPU_CAPABILITY=$capability "$work/venv/bin/python" "$work/draw.py" "$work/$capability.npz"
done
"$work/venv/bin/python" "$work/compare.py" "$work/default.npz" "$work/avx2.npz"
