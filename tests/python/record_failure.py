"""Rank 1 raises; rank 0 fails because of it, later."""

import os

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "1":
        raise ValueError("no such colour")
    dist.all_reduce(torch.ones(1))


main()
