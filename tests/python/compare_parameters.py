"""Compares two safetensors files, key by key.

usage: compare_parameters.py NAME FILE FILE LIMIT
"""

import sys

import torch
from safetensors.torch import load_file

name, limit = sys.argv[1], float(sys.argv[4])
ours, twin = map(load_file, sys.argv[2:4])
if sorted(ours) != sorted(twin):
    sys.exit(f"{name}: the keys differ: {sorted(set(ours) ^ set(twin))}")


def compared(key: str, tensor):
    """Without the biases of attention's keys: they move all scores of a query alike, so their gradient is zero but for rounding, which Adam
    makes as large as any."""
    if not key.endswith("attention.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


differences = {key: (compared(key, ours[key]) - compared(key, twin[key])).abs().max().item() for key in ours}
largest = max(differences, key=differences.get)
print(f"{name}: {len(ours)} tensors, largest difference {differences[largest]:.3g} ({largest})")
if not differences[largest] <= limit:
    sys.exit(f"{name}: more than {limit:g}")
