"""An elastic training whose ranks kill themselves at given places.

usage: elastic.py [KILL]...     KILL: STEP:RANK:PLACE[:agent], with PLACE forward, backward or step

In the round of that number, rank RANK ends by SIGKILL in step STEP, before PLACE; with `:agent` its
agent does. Rank 0 prints how often each sample was applied, and the bits of all
parameters.
"""

import hashlib
import os
import signal
import sys

import ice_launch
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

SAMPLES, BATCH, EPOCHS = 60, 2, 2
KILLS = [kill.split(":") for kill in sys.argv[1:]]


class Numbers(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return index, torch.randn(16, generator=torch.Generator().manual_seed(index))


class Model(nn.Module):
    """Each sample adds 1 to its place in `seen`, the gradient of the loss, once it is applied."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(SAMPLES))
        self.layers = nn.Sequential(nn.Linear(16, 700), nn.Dropout(0.5), nn.Tanh(), nn.Linear(700, 700), nn.Linear(700, 1))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, indices, inputs):
        self.forwards += 1
        return self.layers(inputs).square().mean() - dist.get_world_size() * self.seen[indices].sum()


def say(*words):
    """Prints a line in one write: unbuffered, `print` writes the end of the line by itself."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def die(state, place):
    # Each kill ends a round.
    for step, rank, at, *agent in KILLS[int(os.environ.get("ICE_ROUND", 0)) :][:1]:
        if (state.commits + 1, dist.get_rank(), place) == (int(step), int(rank), at):
            os.kill(os.getppid() if agent else os.getpid(), signal.SIGKILL)
            signal.pause()


torch.manual_seed(1)
model = Model()
slow = [parameter for name, parameter in model.named_parameters() if name != "seen"]
optimizer = torch.optim.SGD([{"params": [model.seen], "lr": 1.0}, {"params": slow, "lr": 0.01, "momentum": 0.9}])
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10**6])
sampler = ice_launch.ElasticSampler(SAMPLES, BATCH, seed=3)
state = ice_launch.State(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, epoch=0)
loader = DataLoader(Numbers(), batch_sampler=sampler)


@ice_launch.elastic
def train(state):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    say("rank", rank, "of", ranks, "pid", os.getpid(), "commits", state.commits)
    wrapped = ice_launch.parallel(state.model, bucket_cap_mb=1)
    for state.epoch in range(state.epoch, EPOCHS):
        state.sampler.set_epoch(state.epoch)
        for indices, inputs in loader:
            die(state, "forward")
            loss = wrapped(indices, inputs)
            die(state, "backward")
            loss.backward()
            die(state, "step")
            state.optimizer.step()
            state.scheduler.step()
            state.commit()
            # A round that ends in the commit leaves the gradients of its step.
            state.optimizer.zero_grad()
    if rank == 0:
        parameters = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
        say("seen", sorted(set(model.seen.tolist())), "forwards", int(model.forwards), "commits", state.commits)
        say("bits", hashlib.sha256(parameters).hexdigest(), scheduler.last_epoch)


train(state)
