"""Reads a model.safetensors the way a PyTorch user would, into the same network written in PyTorch, and prints its shapes."""

import sys

from safetensors.torch import load_file
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)


state = load_file(sys.argv[1])
prefixes = {key.rsplit(".", 2)[0] if key.count(".") > 1 else "" for key in state}
assert len(prefixes) == 1, f"keys of one network expected: {sorted(state)}"
prefix = prefixes.pop()
state = {key[len(prefix) + 1 :] if prefix else key: value for key, value in state.items()}
Net().load_state_dict(state, strict=True)
print("loaded", len(state))
