"""An elastic training whose ranks kill themselves at given places.

usage: elastic.py [OPTION]... [KILL]...

A KILL is STEP:RANK:PLACE[:WHAT], with PLACE forward, backward or step, or 0:RANK:start. In the round of that number,
rank RANK ends by SIGKILL in step STEP, before PLACE. With WHAT `agent` its agent does, with `stop`
its agent is asked to stop, with `hang` the rank stands still, and with `nan` its loss is not finite. With PLACE start, the
process of the rank stops before the elastic function.
Rank 0 prints how often each sample was applied, and the bits of all parameters.
"""

import argparse
import hashlib
import math
import os
import signal
import sys

import ice_launch
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("kills", nargs="*")
parser.add_argument("--samples", type=int, default=60)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--checkpoints", help="folder to save to, and to resume from")
parser.add_argument("--save-every", type=int, default=0, help="steps between two checkpoints, in addition to requests")
parser.add_argument("--until", help="file that ends the training after the epoch in which it appears")
parser.add_argument("--check-finite", action="store_true")
parser.add_argument("--passes", action="store_true", help="rank 0 prints each step that it has committed")
args = parser.parse_args()
SAMPLES, BATCH, EPOCHS = args.samples, 2, args.epochs
KILLS = [kill.split(":") for kill in args.kills]


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


def disturb(state, place):
    """Does what the KILL of this round says. Returns a factor for the loss."""
    # Agents that come late end a round without a KILL. One that is lost does not come back.
    last = [kill for kill in KILLS[-1:] if kill[3:] == ["agent"]]
    for step, rank, at, *what in KILLS[int(os.environ.get("ICE_ROUND", 0)) :][:1] or last:
        if (state.commits + 1, dist.get_rank(), place) != (int(step), int(rank), at):
            continue
        match what:
            case ["stop"]:
                os.kill(os.getppid(), signal.SIGINT)
            case ["nan"]:
                return math.nan
            case ["hang"]:
                signal.pause()
            case _:
                os.kill(os.getppid() if what else os.getpid(), signal.SIGKILL)
                signal.pause()
    return 1


torch.manual_seed(1)
model = Model()
slow = [parameter for name, parameter in model.named_parameters() if name != "seen"]
optimizer = torch.optim.SGD([{"params": [model.seen], "lr": 1.0}, {"params": slow, "lr": 0.01, "momentum": 0.9}])
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10**6])
sampler = ice_launch.ElasticSampler(SAMPLES, BATCH, seed=3)
state = ice_launch.State(
    check_finite=args.check_finite, model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, epoch=0
)
loader = DataLoader(Numbers(), batch_sampler=sampler)
if KILLS[int(os.environ.get("ICE_ROUND", 0)) :][:1] == [["0", os.environ.get("RANK"), "start"]]:
    os.kill(os.getpid(), signal.SIGSTOP)
if args.checkpoints:
    ice_launch.load_checkpoint(state, args.checkpoints)


@ice_launch.elastic(save=args.checkpoints)
def train(state):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    say("rank", rank, "of", ranks, "pid", os.getpid(), "commits", state.commits)
    wrapped = ice_launch.parallel(state.model, bucket_cap_mb=1)
    for state.epoch in range(state.epoch, EPOCHS):
        state.sampler.set_epoch(state.epoch)
        for indices, inputs in loader:
            disturb(state, "forward")
            loss = wrapped(indices, inputs)
            loss = loss * disturb(state, "backward")
            loss.backward()
            disturb(state, "step")
            state.optimizer.step()
            state.scheduler.step()
            state.commit(loss=loss)
            # A round that ends in the commit leaves the gradients of its step.
            state.optimizer.zero_grad()
            if args.passes and rank == 0:
                say("pass", state.commits)
            if args.save_every and state.commits % args.save_every == 0:
                ice_launch.save_checkpoint(state, args.checkpoints, keep=2)
        applied = set(state.model.seen.tolist())
        assert applied == {state.epoch + 1}, f"samples of epoch {state.epoch}: applied {applied} times"
        if args.until:
            ends = torch.tensor(int(os.path.exists(args.until)))
            dist.all_reduce(ends)
            if ends:
                break
    if rank == 0:
        parameters = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
        say("epochs", state.epoch + 1)
        say("seen", sorted(set(model.seen.tolist())), "forwards", int(model.forwards), "commits", state.commits)
        say("bits", hashlib.sha256(parameters).hexdigest(), scheduler.last_epoch)


train(state)
