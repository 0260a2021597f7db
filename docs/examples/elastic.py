"""An elastic DDP script: if a rank is lost, the others continue after the last committed step.

    ice-launch --devices cpu:0-1 --max-restarts 10 elastic.py --checkpoints checkpoints

It runs under torchrun and by itself, too.
"""

import argparse

import ice_launch
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser(description="Fits a small network to a noisy sine")
parser.add_argument("--checkpoints", required=True, help="folder to save to, and to resume from if it has a checkpoint")
parser.add_argument("--epochs", type=int, default=10, help="passes over the samples")
parser.add_argument("--batch-size", type=int, default=64, help="samples per rank and step")
args = parser.parse_args()

torch.manual_seed(0)
x = torch.empty(4096, 1).uniform_(-3, 3)
data = TensorDataset(x, torch.sin(x) + 0.1 * torch.randn(4096, 1))
model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
sampler = ice_launch.ElasticSampler(data, args.batch_size)
loader = DataLoader(data, batch_sampler=sampler)
state = ice_launch.State(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, epoch=0)
ice_launch.load_checkpoint(state, args.checkpoints)


@ice_launch.elastic(save=args.checkpoints)
def train(state):
    model = ice_launch.parallel(state.model)
    if dist.get_rank() == 0:
        print(f"step {state.commits} with {dist.get_world_size()} ranks", flush=True)
    while state.epoch < args.epochs:
        state.sampler.set_epoch(state.epoch)
        for inputs, targets in loader:
            state.optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            state.optimizer.step()
            state.commit(loss=loss)
        state.scheduler.step()
        state.epoch += 1
        # After this commit, the epoch is not repeated.
        state.commit()
        ice_launch.save_checkpoint(state, args.checkpoints, keep=3)
    if dist.get_rank() == 0:
        print(f"{state.epoch} epochs, {state.commits} commits", flush=True)


train(state)
