"""Reads batches through worker processes of each start method of multiprocessing and prints their sums."""
import os
import sys

import torch
from torch.utils.data import DataLoader, Dataset

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Squares(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((4,), float(index)).square() + rank


if __name__ == "__main__":
    for step, method in enumerate(["fork", "spawn", "forkserver"]):
        loader = DataLoader(Squares(), batch_size=3, num_workers=2, multiprocessing_context=method)
        total = sum(batch.sum().item() for batch in loader)
        sys.stdout.write(f"rank {rank} of {ranks} step {step} loss {total:.9f}\n")
