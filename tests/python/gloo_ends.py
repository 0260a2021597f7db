"""Trains two steps with gloo and ends in one of five ways, by the number of the attempt.

An attempt fails on purpose, so that the launcher starts the next one; the last attempt, whose number is the
first argument, succeeds. With `early` as the second argument torch._dynamo is imported at the top.
"""
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if sys.argv[2:] == ["early"]:
    import torch._dynamo  # noqa: F401

# The first rank that fails ends the attempt. The other one is to end by itself all the same: one that
# hangs is killed after --shutdown-timeout.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
attempt, last = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(sys.argv[1])
SHAPES = ["local", "global", "freed", "kept", "error"]
shape = SHAPES[attempt % len(SHAPES)]


def train():
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(torch.ones(4, 64)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # The group's threads are still busy with this one when the group ends.
    total = loss.detach().clone()
    dist.all_reduce(total)
    sys.stdout.write("loss %s with %d threads\n" % (loss.item().hex(), torch.get_num_threads()))
    return model


def main():
    dist.init_process_group("gloo")
    # Without a seed each process draws its own.
    sys.stdout.write("drawn %s\n" % torch.rand(1).item().hex())
    torch.manual_seed(0)
    if shape == "freed":
        train()
    else:
        model = train()
    if shape == "global":
        globals()["model"] = model
    if shape == "error":
        raise ValueError("the attempt ends")
    if shape != "kept":
        dist.destroy_process_group()


main()
sys.stdout.write("attempt %d %s ends\n" % (attempt, shape))
sys.exit(attempt != last)
