"""One replica group of a torchft job, of one rank: trains the network of ddp_steps.py for ever, in step with the other group.

usage: torchft_steps.py MEGABYTES          under torchrun, with REPLICA_GROUP and TORCHFT_LIGHTHOUSE set

Prints `pid <group> <pid>` at the start, and the first group `step <n>` after every step that both took.
"""

import datetime
import os
import sys

import torch
import torchft

from ddp_steps import network


def main():
    group = int(os.environ["REPLICA_GROUP"])
    torch.manual_seed(0)
    net, width = network(float(sys.argv[1]))

    def load(state):
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=datetime.timedelta(seconds=10)),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"net": net.state_dict(), "optimizer": optimizer.state_dict()},
        replica_id=f"group{group}",
    )
    ddp = torchft.DistributedDataParallel(manager, net)
    optimizer = torchft.Optimizer(manager, torch.optim.AdamW(net.parameters(), lr=1e-4))
    print(f"pid {group} {os.getpid()}", flush=True)
    while True:
        optimizer.zero_grad()
        ddp(torch.randn(16, width)).square().mean().backward()
        optimizer.step()
        if group == 0 and manager.num_participants() == 2:
            print(f"step {manager.current_step()}", flush=True)


main()
