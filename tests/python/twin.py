"""What the PyTorch twins of the examples share: the order of the samples, the parameters to begin with, and the training loop.

The order is that of crates/core/src/data/sampler.rs, made anew from its description: Fisher-Yates over a ChaCha8 stream that is keyed by
the seed and the pass.
"""

import argparse
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="of each rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--make-start", help="where parameters to begin with go; nothing is trained")
    parser.add_argument("--start", help="safetensors file with the parameters to begin with")
    parser.add_argument("--save", help="where the parameters go in the end")
    parser.add_argument("--node", required=True, help="name of the module, which the keys start with")
    parser.add_argument("--warm-up", type=int, default=0, help="steps before time is measured")
    return parser


def chacha8(key: bytes, count: int) -> np.ndarray:
    """So many 64-bit numbers of the stream: RFC 8439's block function with 8 rounds, a 64-bit counter and a nonce of zero."""
    blocks = (count + 7) // 8
    start = np.zeros((16, blocks), np.uint32)
    start[:4] = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
    start[4:12] = np.frombuffer(key, "<u4")[:, None]
    start[12] = np.arange(blocks, dtype=np.uint32)
    state = start.copy()

    def mix(a: int, b: int, c: int, d: int) -> None:
        for to, by, rotated, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[to] += state[by]
            state[rotated] ^= state[to]
            state[rotated] = (state[rotated] << np.uint32(bits)) | (state[rotated] >> np.uint32(32 - bits))

    for _ in range(4):
        for column in range(4):
            mix(column, 4 + column, 8 + column, 12 + column)
        for diagonal in range(4):
            mix(diagonal, 4 + (diagonal + 1) % 4, 8 + (diagonal + 2) % 4, 12 + (diagonal + 3) % 4)
    words = (state + start).T.reshape(-1).astype(np.uint64)
    return (words[0::2] | (words[1::2] << np.uint64(32)))[:count]


def permutation(samples: int, seed: int, epoch: int) -> list[int]:
    key = seed.to_bytes(8, "little") + epoch.to_bytes(8, "little") + bytes(16)
    order = list(range(samples))
    for number, i in zip(chacha8(key, samples - 1).tolist(), range(samples - 1, 0, -1)):
        other = number * (i + 1) >> 64
        order[i], order[other] = order[other], order[i]
    return order


class Order(torch.utils.data.Sampler):
    """The samples of a rank: its share of each batch of all ranks."""

    def __init__(self, samples: int, batch: int, seed: int, rank: int, world: int):
        self.samples, self.batch, self.seed, self.rank, self.world, self.epoch = samples, batch, seed, rank, world, 0

    def __iter__(self):
        order = torch.tensor(permutation(self.samples, self.seed, self.epoch))
        self.epoch += 1
        whole = self.batch * self.world
        for first in range(0, self.samples, whole):
            total = min(whole, self.samples - first)
            each, extra = divmod(total, self.world)
            start = first + self.rank * each + min(self.rank, extra)
            yield order[start : start + each + (self.rank < extra)]


def mnist(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All training images at once, and one indexing for a batch: quicker than a DataLoader, whose workers would take the cores."""
    images = np.fromfile(f"{folder}/train-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.fromfile(f"{folder}/train-labels-idx1-ubyte", np.uint8, offset=8)
    images = ((torch.from_numpy(images).float() / 255 - 0.1307) / 0.3081).unsqueeze(1)
    return images, torch.from_numpy(labels).long()


def forever(samples: int, options: argparse.Namespace):
    """The indices of this rank's batches."""
    order = Order(samples, options.batch_size, options.seed, dist.get_rank(), dist.get_world_size())
    while True:
        yield from order


def train(options, model: nn.Module, optimizer_of, step, schedule_of=None, clip=None) -> None:
    """Trains for so many steps. `step(model)` is the loss of the next batch."""
    prefix = options.node + "."
    if options.make_start:
        save(model, prefix, options.make_start)
        return
    if options.start:
        saved = load_file(options.start)
        model.load_state_dict({key.removeprefix(prefix): value for key, value in saved.items()})
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer) if schedule_of else None
    start, loss = time.perf_counter(), None
    for number in range(options.steps):
        if number == options.warm_up:
            dist.barrier()
            start = time.perf_counter()
        optimizer.zero_grad()
        loss = step(parallel)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule:
            schedule.step()
    seconds = (time.perf_counter() - start) / max(1, options.steps - options.warm_up)
    loss = loss.detach()
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        print(f"loss {loss.item() / dist.get_world_size():.9f}")
        print(f"step {seconds:.9f}", flush=True)
        if options.save:
            save(model, prefix, options.save)


def save(model: nn.Module, prefix: str, file: str) -> None:
    save_file({prefix + key: value.contiguous() for key, value in model.state_dict().items()}, file)


def run(main) -> None:
    if "--make-start" in sys.argv:
        return main()
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # PyTorch 2.13 sometimes aborts in its static destructors after DDP on gloo, under torchrun as well.
    os._exit(0)
