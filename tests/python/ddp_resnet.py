"""The twin of examples/resnet.rs.

usage: ddp_resnet.py DATA --steps N --batch-size N --node net [--sync-batch-norm] [--double] [--lr RATE] [--start FILE] [--save FILE]
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
import twin
from torch import nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm(nn.BatchNorm2d):
    """PyTorch's own refuses tensors of the CPU. The same from its formula, whose gradients are autograd's."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, features = [0, 2, 3], (1, -1, 1, 1)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum(dims)) / count
        distance = x - mean.view(features)
        var = all_reduce(distance.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return distance * scale.view(features) + self.bias.view(features)


class BasicBlock(nn.Module):
    def __init__(self, channels, features, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.bn1 = norm(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = norm(features)
        self.downsample = None
        if channels != features or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, features, 1, stride, bias=False), norm(features))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        around = self.downsample(x) if self.downsample else x
        return F.relu(self.bn2(self.conv2(out)) + around)


class ResNet(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1, norm))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2, norm))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2, norm))
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def main() -> None:
    parser = twin.arguments()
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--sync-batch-norm", action="store_true")
    parser.add_argument("--double", action="store_true", help="compute with 64 bits")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels = twin.mnist(options.data)
    model = ResNet(SyncBatchNorm if options.sync_batch_norm else nn.BatchNorm2d)
    if options.double:
        model = model.double()
    dtype = model.fc.weight.dtype
    batches = twin.forever(len(images), options)

    def step(model):
        indices = next(batches)
        return F.cross_entropy(model(images[indices].to(dtype)), labels[indices])

    def optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, fused=True)

    twin.train(options, model, optimizer, step)


twin.run(main)
