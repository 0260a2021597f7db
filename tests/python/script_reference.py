"""Writes crates/core/tests/reference/script: a TorchScript module with a batch norm, traced and scripted, and what PyTorch makes of it.

usage: script_reference.py FOLDER   (with torch 2.13 and safetensors 0.8)

net.pt          the scripted module
traced.pt       the same module, traced, which fixes the mode of its batch norm
steps.safetensors
    x [12, 4], target [12, 3], before [12, 3]: inputs, and the outputs of an evaluation before training
    after [12, 3]: the outputs of an evaluation after three steps of SGD (lr 0.1, momentum 0.9) with the mean square error
    state.<key>: the state dict after these steps
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.last = torch.nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            # Another tensor, where a batch norm changes its own.
            self.seen = self.seen * 0.5 + 1
        return self.last(torch.relu(self.norm(self.first(x))))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net()
    x, target = torch.randn(12, 4), torch.randn(12, 3)
    torch.jit.script(net).save(folder / "net.pt")
    torch.jit.trace(net.eval(), x).save(folder / "traced.pt")
    before = net.eval()(x).detach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
    after = net.eval()(x).detach()
    tensors = {"x": x, "target": target, "before": before, "after": after}
    tensors |= {f"state.{key}": value.clone() for key, value in net.state_dict().items()}
    save_file(tensors, folder / "steps.safetensors")


if __name__ == "__main__":
    main()
