"""Trains with DistributedDataParallel and writes when steps were applied.

In the first attempt rank 1 kills itself after its second step, if the first argument is `kill`. With
`stay` the ranks wait for their end after the first step. Lines: `step|killed NANOSECONDS ATTEMPT`.
"""
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def tell(what, attempt):
    sys.stdout.write("%s %d %s\n" % (what, time.time_ns(), attempt))
    sys.stdout.flush()


def main():
    attempt, how = os.environ["TORCHELASTIC_RESTART_COUNT"], sys.argv[1]
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).sum().backward()
        optimizer.step()
        if step == 0:
            tell("step", attempt)
            if how == "stay":
                signal.pause()
        if step == 1 and how == "kill" and attempt == "0":
            if dist.get_rank() == 1:
                tell("killed", attempt)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    dist.destroy_process_group()


main()
