"""Trains a network of the size asked for with DistributedDataParallel for ever, saving nothing: what a launcher starts again.

usage: ddp_steps.py MEGABYTES
"""

import os
import sys

import torch
import torch.distributed as dist


def network(megabytes):
    """A network whose parameters, with AdamW's two moments, take so many megabytes; and the width of its input."""
    width = 512
    layers = max(1, int(megabytes * 1e6 / (12 * width * width)))
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)]), width


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    print(f"pid {rank} {os.getpid()}", flush=True)
    torch.manual_seed(0)
    net, width = network(float(sys.argv[1]))
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4)
    step = 0
    while True:
        optimizer.zero_grad()
        ddp(torch.randn(16, width)).square().mean().backward()
        optimizer.step()
        step += 1
        if rank == 0:
            print(f"step {step}", flush=True)


if __name__ == "__main__":
    main()
