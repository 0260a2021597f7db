"""The twin of examples/mnist.rs, without dropout.

usage: ddp_mnist.py DATA --steps N --batch-size N --node net [--lr RATE] [--start FILE] [--save FILE] [--warm-up N]
"""

import torch
import torch.nn.functional as F
import twin
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, images):
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.view(-1, 320)))
        return F.log_softmax(self.fc2(x), -1)


def main() -> None:
    parser = twin.arguments()
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels = twin.mnist(options.data)
    batches = twin.forever(len(images), options)

    def step(model):
        indices = next(batches)
        return F.nll_loss(model(images[indices]), labels[indices])

    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)

    twin.train(options, Net(), optimizer, step)


twin.run(main)
