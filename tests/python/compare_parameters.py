"""Compares two safetensors files, key by key.

usage: compare_parameters.py NAME FILE FILE LIMIT
"""

import sys

from safetensors.torch import load_file

name, limit = sys.argv[1], float(sys.argv[4])
ours, twin = map(load_file, sys.argv[2:4])
if sorted(ours) != sorted(twin):
    sys.exit(f"{name}: the keys differ: {sorted(set(ours) ^ set(twin))}")
differences = {key: (ours[key] - twin[key]).abs().max().item() for key in ours}
largest = max(differences, key=differences.get)
print(f"{name}: {len(ours)} tensors, largest difference {differences[largest]:.3g} ({largest})")
if not differences[largest] <= limit:
    sys.exit(f"{name}: more than {limit:g}")
