"""Trains three steps with Hugging Face's accelerate and prints the loss of each rank."""
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

set_seed(7)
accelerator = Accelerator(cpu=True)
data = TensorDataset(torch.randn(48, 8), torch.randn(48, 1))
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, (x, y) in enumerate(loader):
    loss = torch.nn.functional.mse_loss(model(x), y)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    sys.stdout.write(f"rank {accelerator.process_index} of {accelerator.num_processes} step {step} loss {loss.item():.9f}\n")
accelerator.end_training()
