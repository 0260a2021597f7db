"""Prints the seconds that gloo takes to broadcast so many MB from rank 0, five times.

usage: gloo_broadcast.py MEGABYTES
"""

import sys
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
data = torch.ones(int(float(sys.argv[1]) * 1e6), dtype=torch.uint8)
dist.broadcast(data, 0)
for _ in range(5):
    dist.barrier()
    begun = time.perf_counter()
    dist.broadcast(data, 0)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{time.perf_counter() - begun:.4f}")
dist.destroy_process_group()
