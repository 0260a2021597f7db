"""The twin of examples/gpt.rs.

usage: ddp_gpt.py TEXT --steps N --batch-size N --node gpt [--lr RATE] [--start FILE] [--save FILE] [--warm-up N]
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
import twin
from torch import nn

VOCABULARY, CONTEXT, LAYERS, HEADS, WIDTH = 256, 64, 4, 4, 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 4 * WIDTH)
        self.contract = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        n, t, _ = x.shape
        query, key, value = (
            part.view(n, t, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.attention(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(n, t, WIDTH))
        return x + self.contract(F.gelu(self.expand(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The branches of all layers add up.
                branch = re.search("project|contract", name)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    parser = twin.arguments()
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    text = np.fromfile(options.data, np.uint8)
    text = torch.from_numpy(text[: len(text) // 10 * 9])
    windows = torch.as_strided(text, ((len(text) - 1) // CONTEXT, CONTEXT + 1), (CONTEXT, 1))
    batches = twin.forever(len(windows), options)

    def step(model):
        batch = windows[next(batches)].long()
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))

    def optimizer(model):
        plain, decayed = [], []
        for name, parameter in model.named_parameters():
            (plain if re.search(r"norm|bias$|tokens|places", name) else decayed).append(parameter)
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
        return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)

    def schedule(optimizer):
        warm = min(options.steps, 100) // 2
        rest = options.steps - warm

        def factor(number: int) -> float:
            if number < warm:
                return (number + 1) / (warm + 1)
            share = min(1.0, (number - warm) / rest)
            return 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    twin.train(options, Gpt(), optimizer, step, schedule, clip=1.0)


twin.run(main)
