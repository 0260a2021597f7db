"""A DDP script that resumes from its checkpoint if there is one, and saves when it has to stop.

    ice-launch --devices cpu:0-1 ddp.py --checkpoint checkpoint.pt --steps 1000
"""

import argparse
import os
import signal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def options():
    parser = argparse.ArgumentParser(description="Fits a small network to a noisy sine")
    add = parser.add_argument
    add("--checkpoint", required=True, help="file to save to, and to resume from if it exists")
    add("--steps", type=int, default=1000, help="training steps of the whole job")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--batch-size", type=int, default=64, help="samples per rank and step")
    add("--lr", type=float, default=1e-2, help="learning rate")
    return parser.parse_args()


def load(path):
    """Rank 0 reads for all, so only its node needs the file. None if there is no checkpoint yet."""
    state = [None]
    if dist.get_rank() == 0 and os.path.exists(path):
        state[0] = torch.load(path, map_location="cpu", weights_only=True)
    dist.broadcast_object_list(state, src=0)
    return state[0]


def save(path, step, model, optimizer):
    """Writes a file next to the checkpoint and renames it: a killed process leaves no half file."""
    if dist.get_rank() == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        state["step"] = step
        torch.save(state, path + ".new")
        os.replace(path + ".new", path)


def main():
    args = options()
    # The launcher sends SIGTERM when the job has to stop. Ranks may receive it in different steps.
    stopped = False

    def stop(*_):
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    model = DistributedDataParallel(model.to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    step = 0
    state = load(args.checkpoint)
    if state is not None:
        step = state["step"]
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if dist.get_rank() == 0:
        print(f"step {step} of {args.steps} with {dist.get_world_size()} ranks", flush=True)

    while step < args.steps:
        # Samples depend on step and rank alone: a resumed run sees the same ones.
        seed = step * dist.get_world_size() + dist.get_rank()
        generator = torch.Generator().manual_seed(seed)
        x = torch.empty(args.batch_size, 1).uniform_(-3, 3, generator=generator).to(device)
        loss = (model(x) - torch.sin(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        # All ranks stop after the same step, once one of them has received the signal.
        must_stop = torch.tensor(float(stopped), device=device)
        dist.all_reduce(must_stop, op=dist.ReduceOp.MAX)
        if must_stop.item() > 0:
            break
        if step % args.save_every == 0:
            save(args.checkpoint, step, model, optimizer)

    save(args.checkpoint, step, model, optimizer)
    if dist.get_rank() == 0:
        print(f"saved step {step}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
