"""A program written for torchrun: forms the group, reduces, trains a few steps with DDP, and checks that all ranks agree."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    assert total.item() == world * (world + 1) / 2, total

    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()

    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(every, mine)
    assert all(torch.equal(mine, other) for other in every), "the ranks' parameters differ"

    group, local = os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"]
    # In one piece, so that the lines of two ranks never mix.
    sys.stdout.write(f"rank {rank} of {world} on node {group} local {local} sum {total.item():g}\n")
    sys.stdout.flush()
    dist.destroy_process_group()
    # PyTorch 2.13 sometimes aborts in its static destructors after DDP on gloo, under torchrun as well.
    os._exit(0)


if __name__ == "__main__":
    main()
