"""Trains three steps of a small GPT-2 with the Trainer of transformers and prints the loss of each rank."""
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed


class Printing(Trainer):
    def compute_loss(self, model, inputs, *arguments, **options):
        loss = super().compute_loss(model, inputs, *arguments, **options)
        value = (loss[0] if isinstance(loss, tuple) else loss).item()
        rank, ranks = self.args.process_index, self.args.world_size
        sys.stdout.write(f"rank {rank} of {ranks} step {self.state.global_step} loss {value:.9f}\n")
        return loss


set_seed(7)
tokens = torch.randint(0, 64, (48, 16))
data = [{"input_ids": row, "labels": row} for row in tokens]
config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=8, use_cpu=True, ddp_backend="gloo", report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )
    Printing(model=GPT2LMHeadModel(config), args=arguments, train_dataset=data).train()
