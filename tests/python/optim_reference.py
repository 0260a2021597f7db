"""What torch's optimizers and schedules make of fixed gradients: the numbers in crates/core/tests/reference/optim.json.

optim_reference.py > crates/core/tests/reference/optim.json
"""

import json

import torch
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim import lr_scheduler as schedules

STEPS = 6


def wave(count, scale):
    return torch.sin(torch.arange(count, dtype=torch.float32) * scale)


def parameters():
    return [wave(6, 0.3).reshape(3, 2).requires_grad_(), wave(4, 0.9).requires_grad_()]


def gradients(step):
    # The second parameter takes no part in step 3.
    return [wave(6, 0.4 * step).reshape(3, 2) + 0.2, None if step == 3 else wave(4, 0.7 + step)]


def trace(make):
    params = parameters()
    optimizer = make(params)
    steps = []
    for step in range(1, STEPS + 1):
        for param, grad in zip(params, gradients(step)):
            param.grad = grad
        optimizer.step()
        steps.append([value for param in params for value in param.detach().flatten().tolist()])
    return steps


def courses(make, course):
    """With fields of the parameter group that are set before each step."""
    params = parameters()
    optimizer = make(params)
    steps = []
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0].update(course(step - 1))
        for param, grad in zip(params, gradients(step)):
            param.grad = grad
        optimizer.step()
        steps.append([value for param in params for value in param.detach().flatten().tolist()])
    return steps


def momenta(steps):
    optimizer = SGD(parameters(), lr=0.5, momentum=0.9)
    schedule = schedules.OneCycleLR(optimizer, 0.5, steps)
    made = []
    for _ in range(steps):
        made.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if len(made) < steps:
            schedule.step()
    return made


def plateau(values, **options):
    """The learning rate after each of the values."""
    optimizer = SGD(parameters(), lr=0.5)
    schedule = schedules.ReduceLROnPlateau(optimizer, **options)
    made = []
    for value in values:
        schedule.step(value)
        made.append(optimizer.param_groups[0]["lr"])
    # JSON has no NaN.
    return {"values": [None if value != value else value for value in values], "rates": made}


DOWN = [3.0, 2.0, 1.99999, 1.99, 1.99, 1.98, 1.5, 1.5, 1.5, 1.6, float("nan"), 1.5, 1.2, 1.19, 1.18, 1.17, 1.16, 1.3, 1.3, 1.3]
UP = [0.1, 0.3, 0.302, 0.304, 0.308, 0.4, 0.45, 0.46, float("nan"), 0.47, 0.48, 0.6, 0.6, 0.6, 0.6, 0.9]


def rates(make, steps=40):
    optimizer = SGD(parameters(), lr=0.5)
    schedule = make(optimizer)
    made = []
    for _ in range(steps):
        made.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return made


print(
    json.dumps(
        {
            "optimizers": {
                "adam": trace(lambda p: Adam(p, lr=0.1, fused=True)),
                "adam with penalty": trace(lambda p: Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=True)),
                "adam amsgrad": trace(lambda p: Adam(p, lr=0.1, amsgrad=True, fused=True)),
                "adamw": trace(lambda p: AdamW(p, lr=0.1, weight_decay=0.05, fused=True)),
                "sgd": trace(lambda p: SGD(p, lr=0.1, weight_decay=0.01, fused=True)),
                "sgd nesterov": trace(lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True)),
                "rmsprop": trace(lambda p: RMSprop(p, lr=0.1, foreach=True)),
                "rmsprop centered": trace(lambda p: RMSprop(p, lr=0.1, alpha=0.9, momentum=0.8, centered=True, weight_decay=0.01, foreach=True)),
                "sgd courses": courses(
                    lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
                    lambda step: {"momentum": 0.0 if step in (2, 4) else 0.5 + 0.05 * step, "weight_decay": 0.1 * (1 + step)},
                ),
                "adamw courses": courses(
                    lambda p: AdamW(p, lr=0.1, weight_decay=0.05, fused=True),
                    lambda step: {"lr": 0.1 * 0.5**step, "betas": (0.9 - 0.02 * step, 0.99 + 0.001 * step), "weight_decay": 0.05 * (1 + step)},
                ),
                "rmsprop courses": courses(
                    lambda p: RMSprop(p, lr=0.1, alpha=0.9, momentum=0.8, foreach=True),
                    lambda step: {"momentum": 0.0 if step == 3 else 0.8, "alpha": 0.9 + 0.01 * step, "eps": 1e-8 * (1 + step)},
                ),
            },
            "schedules": {
                "step": rates(lambda o: schedules.StepLR(o, 7, 0.3)),
                "milestones": rates(lambda o: schedules.MultiStepLR(o, [3, 20], 0.1)),
                "exponential": rates(lambda o: schedules.ExponentialLR(o, 0.9)),
                "linear": rates(lambda o: schedules.LinearLR(o, 0.2, 0.9, 15)),
                "cosine": rates(lambda o: schedules.CosineAnnealingLR(o, 30, 0.05), 31),
                "one cycle momentum": momenta(40),
                "one cycle": rates(lambda o: schedules.OneCycleLR(o, 0.5, 40)),
                "warm-up and cosine": rates(
                    lambda o: schedules.SequentialLR(
                        o, [schedules.LinearLR(o, 0.1, 1.0, 10), schedules.CosineAnnealingLR(o, 30, 0.05)], [10]
                    )
                ),
            },
            "plateaus": {
                "min rel": plateau(DOWN, patience=1),
                "min abs": plateau(DOWN, patience=1, threshold=0.05, threshold_mode="abs"),
                "max rel": plateau(UP, mode="max", patience=1, threshold=0.02),
                "max abs": plateau(UP, mode="max", patience=0, threshold=0.1, threshold_mode="abs"),
                "cooldown": plateau(DOWN, patience=1, cooldown=2),
                "floor": plateau(DOWN, patience=0, factor=0.3, min_lr=0.03, eps=0.0),
                "eps": plateau(DOWN, patience=0, factor=0.5, eps=0.1),
            },
        }
    )
)
