#!/usr/bin/env bash
# The learning rates of a resumed run depend on whether the scheduler was made before or after the optimizer's state was loaded.
#
# Expected: load_state_dict of optimizer and scheduler restores both, in whatever order the objects are made, as for most schedulers.
# True: the constructor of a scheduler writes a rate into the optimizer. LinearLR, ConstantLR, SequentialLR and ChainedScheduler then
# multiply what they find for the rest of the run (a tenth of the right rate, with a warmup from a tenth); LambdaLR and OneCycleLR
# are wrong for one step. No error, no warning. Make the scheduler first, then load the optimizer, then the scheduler.

set -euo pipefail

readonly VERSION=2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==$VERSION" numpy

cat >"$work/resume.py" <<'PYTHON'
import copy
import sys

import torch
from torch.optim import lr_scheduler as lr

SAVED, STEPS = 4, 10
SCHEDULERS = {
    "StepLR": lambda o: lr.StepLR(o, 3, 0.1),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 10),
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 1.0, 10),
    "LinearLR": lambda o: lr.LinearLR(o, 0.1, 1.0, 8),
    "ConstantLR": lambda o: lr.ConstantLR(o, 0.1, 8),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, 1.0, 3), lr.CosineAnnealingLR(o, 7)], [3]),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.LinearLR(o, 0.1, 1.0, 8), lr.ExponentialLR(o, 0.9)]),
}
EXPECTED = {"StepLR": 0, "CosineAnnealingLR": 0, "LambdaLR": 1, "OneCycleLR": 1}


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(opt, scheduler, steps):
    taken = []
    for _ in range(steps):
        taken.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return taken


def wrong_steps(make, scheduler_first):
    opt = optimizer()
    scheduler = make(opt)
    rates(opt, scheduler, SAVED)
    saved = copy.deepcopy((opt.state_dict(), scheduler.state_dict()))
    undisturbed = rates(opt, scheduler, STEPS - SAVED)

    opt = optimizer()
    scheduler = make(opt) if scheduler_first else None
    opt.load_state_dict(saved[0])
    scheduler = scheduler or make(opt)
    scheduler.load_state_dict(saved[1])
    resumed = rates(opt, scheduler, STEPS - SAVED)
    return sum(abs(a - b) > 1e-9 for a, b in zip(undisturbed, resumed))


print("torch", torch.__version__)
print(f"wrong rates in the {STEPS - SAVED} steps after a resume, the scheduler made")
changed = False
for name, make in SCHEDULERS.items():
    first, second = wrong_steps(make, True), wrong_steps(make, False)
    print(f"  {name:18} before the optimizer's state was loaded: {first}, after: {second}")
    changed |= first != 0 or second != EXPECTED.get(name, STEPS - SAVED)
if changed:
    sys.exit("CHANGED: other schedulers depend on the order")
PYTHON
"$work/venv/bin/python" -W ignore "$work/resume.py"
