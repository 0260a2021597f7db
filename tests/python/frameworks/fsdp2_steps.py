"""Trains three steps with FSDP2, saves and loads with torch.distributed.checkpoint, and prints losses."""
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
x, y = torch.randn(3, ranks, 8, 8), torch.randn(3, ranks, 8, 4)


def step(number):
    loss = torch.nn.functional.mse_loss(model(x[number, rank]), y[number, rank])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    sys.stdout.write(f"rank {rank} of {ranks} step {number} loss {loss.item():.9f}\n")


folder = [tempfile.mkdtemp() if rank == 0 else None]
dist.broadcast_object_list(folder)
step(0), step(1)
weights, moments = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder[0])
step(2)
weights, moments = get_state_dict(model, optimizer)
state = {"model": weights, "optimizer": moments}
dcp.load(state, checkpoint_id=folder[0])
set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
step(2)
dist.barrier()
if rank == 0:
    import shutil

    shutil.rmtree(folder[0])
dist.destroy_process_group()
