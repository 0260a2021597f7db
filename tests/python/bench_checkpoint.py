"""The times of PyTorch's ways to save and load, and of a plain write, for scripts/bench-checkpoint. Prints `<name> <seconds>` lines.

usage: bench_checkpoint.py DIR MEGABYTES
"""

import os
import shutil
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

folder, size = sys.argv[1], int(sys.argv[2]) * 1_000_000
LAYERS = 40
# Of each kind; the last one counts.
SAVES = 4
# A network and AdamW's two moments.
width = size // 12 // LAYERS
state = {
    f"{part}.layer{layer}": torch.randn(width) for part in ("model", "exp_avg", "exp_avg_sq") for layer in range(LAYERS)
}


@contextmanager
def timed(name: str):
    start = time.perf_counter()
    yield
    print(name, time.perf_counter() - start, flush=True)


def discard_old(name: str, number: int) -> str:
    """The path of the file of this number; the one before the last is removed."""
    old = os.path.join(folder, f"{name}.{number - 2}")
    if os.path.exists(old):
        os.remove(old)
    return os.path.join(folder, f"{name}.{number}")


whole = torch.ones(size // 4)
data = memoryview(whole.numpy()).cast("B")
for number in range(SAVES):
    # A checkpoint is a new file while the one before is still there.
    path = discard_old("plain", number)
    os.sync()
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for at in range(0, size, 4 << 20):
            file.write(data[at : at + (4 << 20)])
        os.fsync(file.fileno())
print("write", time.perf_counter() - start, flush=True)
del data, whole

for number in range(SAVES):
    path = discard_old("state.pt", number)
    os.sync()
    start = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
print("torch.save", time.perf_counter() - start, flush=True)
loaded = torch.load(path, weights_only=True)
del loaded
with timed("torch.load"):
    loaded = torch.load(path, weights_only=True)
with timed("torch.load-state-dict"):
    loaded = torch.load(path, weights_only=True)
    for key, value in state.items():
        value.copy_(loaded[key])
del loaded

dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
writer = lambda: dcp.FileSystemWriter(os.path.join(folder, "dcp"), overwrite=True, sync_files=True)
for name in ("", "", "", "dcp.save"):
    os.sync()
    start = time.perf_counter()
    dcp.save(state, storage_writer=writer())
    if name:
        print(name, time.perf_counter() - start, flush=True)
loaded = {key: torch.empty_like(value) for key, value in state.items()}
with timed("dcp.load"):
    dcp.load(loaded, checkpoint_id=os.path.join(folder, "dcp"))
del loaded
for name in ("", "", "dcp.async_save"):
    os.sync()
    start = time.perf_counter()
    future = dcp.async_save(state, storage_writer=writer())
    stall = time.perf_counter() - start
    future.result()
    if name:
        print(f"{name}-stall", stall)
        print(name, time.perf_counter() - start, flush=True)
shutil.rmtree(os.path.join(folder, "dcp"))
dist.destroy_process_group()
