"""An ordinary DDP script that resumes from its checkpoint. In its first life rank 2 is killed at step 50.

usage: ddp_crash.py CHECKPOINT    prints `killed at <seconds>`, `resumed at <seconds>` and at the end `done after <steps> steps`
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 60
SAVE_EVERY = 10


def main() -> None:
    path = sys.argv[1]
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        model.module.load_state_dict(saved["model"])
        done = saved["step"]
    for step in range(done + 1, STEPS + 1):
        if first_life and step == 50 and rank == 2:
            print(f"killed at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        model(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
        if not first_life and step == done + 1 and rank == 0:
            print(f"resumed at {time.time()}", flush=True)
        if step % SAVE_EVERY == 0 and rank == 0:
            torch.save({"model": model.module.state_dict(), "step": step}, path + ".partial")
            os.replace(path + ".partial", path)
    if rank == 0:
        print(f"done after {STEPS} steps, of which {done} were not repeated", flush=True)
    dist.destroy_process_group()


main()
