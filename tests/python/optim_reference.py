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
            },
            "schedules": {
                "step": rates(lambda o: schedules.StepLR(o, 7, 0.3)),
                "milestones": rates(lambda o: schedules.MultiStepLR(o, [3, 20], 0.1)),
                "exponential": rates(lambda o: schedules.ExponentialLR(o, 0.9)),
                "linear": rates(lambda o: schedules.LinearLR(o, 0.2, 0.9, 15)),
                "cosine": rates(lambda o: schedules.CosineAnnealingLR(o, 30, 0.05), 31),
                "one cycle": rates(lambda o: schedules.OneCycleLR(o, 0.5, 40)),
                "warm-up and cosine": rates(
                    lambda o: schedules.SequentialLR(
                        o, [schedules.LinearLR(o, 0.1, 1.0, 10), schedules.CosineAnnealingLR(o, 30, 0.05)], [10]
                    )
                ),
            },
        }
    )
)
