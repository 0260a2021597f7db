#!/usr/bin/env bash
# Batch norm changes its running statistics, and their tensors' version counters stay the same.
#
# Expected: `tensor._version` grows with each change in place, as autograd relies on; so a buffer whose version has not
# changed has not changed.
# True: the kernel of batch norm writes running_mean and running_var directly. Only num_batches_tracked, which Python
# adds to, has a new version. Code that copies the buffers of a module when their version changes (to undo a step, or to
# send what is new) keeps old statistics without an error. Copy the buffers, or compare them.

set -euo pipefail

readonly VERSION=2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/versions.py" <<'PYTHON'
import sys

import torch

norm = torch.nn.BatchNorm1d(2)
before = {name: (buffer.clone(), buffer._version) for name, buffer in norm.named_buffers()}
norm(torch.randn(4, 2))
print("torch", torch.__version__)
silent = []
for name, buffer in norm.named_buffers():
    value, version = before[name]
    changed, counted = not torch.equal(value, buffer), version != buffer._version
    print(f"{name}: changed: {changed}, new version: {counted}")
    if changed and not counted:
        silent.append(name)
if silent != ["running_mean", "running_var"]:
    sys.exit("CHANGED: other buffers change without a new version")
PYTHON
"$work/venv/bin/python" "$work/versions.py"
