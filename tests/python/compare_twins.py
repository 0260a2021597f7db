"""Compares what an example and its twin have come to: the parameters, key by key, and the loss of the last step.

usage: compare_twins.py NAME START OURS TWIN RUN LOSS OUTPUT LIMIT

START, OURS and TWIN are safetensors files: what both began with, and what each ended with. RUN is the example's folder, whose event files
have its loss under the tag LOSS; OUTPUT is what the twin printed. Nothing may differ by more than LIMIT.
"""

import math
import sys

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def compared(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Without the biases of attention's keys: they move all scores of a query alike, so their gradient is zero but for rounding, which Adam
    makes as large as any."""
    if not key.endswith("attention.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


name, *files, run, tag, output, limit = sys.argv[1:]
start, ours, twin = (
    {key: compared(key, tensor) for key, tensor in load_file(file).items()} for file in files
)
limit = float(limit)
if sorted(ours) != sorted(twin):
    sys.exit(f"{name}: the keys differ: {sorted(set(ours) ^ set(twin))}")
still = [key for key in ours if (ours[key] - start[key]).abs().max().item() <= limit]
if still:
    sys.exit(f"{name}: not trained, so that there is nothing to compare: {still}")
differences = {key: (ours[key] - twin[key]).abs().max().item() for key in ours}
largest = max(differences, key=differences.get)

last = EventAccumulator(run).Reload().Scalars(tag)[-1]
own = last.value
other = next(float(line.split()[1]) for line in open(output) if line.startswith("loss "))
print(
    f"{name}: {len(ours)} tensors, largest difference {differences[largest]:.3g} ({largest}); "
    f"loss of step {last.step} {own:.6f}, of the twin {other:.6f}"
)
if not differences[largest] <= limit or not math.isclose(own, other, rel_tol=0, abs_tol=limit):
    sys.exit(f"{name}: they differ by more than {limit:g}")
