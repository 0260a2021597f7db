"""Writes crates/core/tests/reference/init: parameters of a small PyTorch model as programs save them.

usage: init_reference.py FOLDER   (with torch 2.13 and safetensors 0.8)
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# The shard of a parameter in the sharded form.
SHARDS = {"conv": "model-00001-of-00002.safetensors", "norm": "model-00001-of-00002.safetensors"}
LAST = "model-00002-of-00002.safetensors"


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)
        self.fc = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(1))


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "sharded").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    net = Net()
    net.train()(torch.randn(4, 1, 4, 4))
    state = net.state_dict()
    save_file(state, folder / "net.safetensors")
    save_file({f"module.{key}": value for key, value in state.items()}, folder / "ddp.safetensors")
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in half.items():
        shards.setdefault(SHARDS.get(key.split(".")[0], LAST), {})[key] = value
    for name, tensors in shards.items():
        save_file(tensors, folder / "sharded" / name)
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in half.values())},
        "weight_map": {key: name for name, tensors in shards.items() for key in tensors},
    }
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
