"""What torch.distributed does through the store, on gloo: store_collectives.py FOLDER. Rank 0 prints `ok NAME` for each."""

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.nn.parallel import DistributedDataParallel


def done(name):
    dist.barrier()
    if dist.get_rank() == 0:
        print("ok", name, flush=True)


dist.init_process_group("gloo", timeout=timedelta(seconds=30))
rank, size = dist.get_rank(), dist.get_world_size()
ones = torch.ones(3)
dist.all_reduce(ones)
assert ones.tolist() == [size] * 3
done("all_reduce")

time.sleep(0.3 if rank == 1 else 0)
dist.monitored_barrier(timeout=timedelta(seconds=10))
done("a late rank")

objects = [None] * size
dist.all_gather_object(objects, {"rank": rank})
assert [one["rank"] for one in objects] == list(range(size))
halves = [dist.new_group([member for member in range(size) if member % 2 == half]) for half in range(2)]
mine = torch.tensor([rank])
dist.all_reduce(mine, group=halves[rank % 2])
assert mine.item() == sum(member for member in range(size) if member % 2 == rank % 2)
done("groups")

torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    model(torch.full((2, 4), float(rank + step))).sum().backward()
    optimizer.step()
weights = [torch.empty(2, 4) for _ in range(size)]
dist.all_gather(weights, model.module.weight.detach())
assert all(torch.equal(weight, weights[0]) for weight in weights)
done("DDP")

checkpoint.save({"model": model.module.state_dict()}, checkpoint_id=sys.argv[1])
read = {"model": {name: torch.zeros_like(value) for name, value in model.module.state_dict().items()}}
checkpoint.load(read, checkpoint_id=sys.argv[1])
assert torch.equal(read["model"]["weight"], model.module.weight)
done("checkpoint")
store = dist.distributed_c10d._get_default_store()
if dist.get_rank() == 2:
    # It is there, and does not come to the barrier.
    store.wait(["over"])
else:
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=1))
        raise SystemExit("a missing rank is not missed")
    except RuntimeError as problem:
        assert dist.get_rank() != 0 or "ank 2" in str(problem), problem
    if dist.get_rank() == 0:
        print("ok a missing rank", flush=True)
        store.set("over", "")
