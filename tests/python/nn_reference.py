"""What PyTorch's layers begin with, give and learn: the tensors in crates/nn/tests/reference/layers.safetensors.

nn_reference.py crates/nn/tests/reference/layers.safetensors

For each layer, made after `torch.manual_seed(SEED)`:

    NAME/start/PARAMETER    its state dict, to the bit
    NAME/state/PARAMETER    the same after a push away from round numbers
    NAME/in/N               inputs
    NAME/train/N            outputs in training, from that state
    NAME/grad/PARAMETER     gradients of the sum of the outputs, each element weighted by its place
    NAME/grad_in/N          the same, of inputs that are floats
    NAME/after/BUFFER       buffers after training
    NAME/eval/N             outputs in evaluation after that
    NAME/next               two numbers from the generator, drawn after the layer was made: it drew as many

and for larger ones `NAME/spread/PARAMETER`: least, largest, mean and deviation of the state dict, as doubles.
"""

import sys

import torch
from safetensors.torch import save_file
from torch import nn

SEED = 11
tensors = {}


def put(name, tensor):
    assert name not in tensors, name
    # A view or a shared storage would be refused, and a scalar is one element.
    tensors[name] = tensor.detach().clone().contiguous()


def weighted_sum(outputs):
    total = 0
    for output in outputs:
        places = torch.arange(output.numel(), dtype=torch.float32).view_as(output)
        total = total + (output * torch.sin(places)).sum()
    return total


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for output in outputs if output is not None for tensor in flat(output)]


def case(name, make, inputs, call=None, trains=True):
    call = call or (lambda layer, *xs: layer(*xs))
    torch.manual_seed(SEED)
    layer = make()
    put(f"{name}/next", torch.rand(2))
    for key, value in layer.state_dict().items():
        put(f"{name}/start/{key}", value)
    torch.manual_seed(SEED + 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        # Still what no optimizer would move.
        if getattr(layer, "padding_idx", None) is not None:
            layer.weight[layer.padding_idx] = 0
    for key, value in layer.state_dict().items():
        put(f"{name}/state/{key}", value)
    inputs = inputs()
    for number, x in enumerate(inputs):
        put(f"{name}/in/{number}", x)
        if x.is_floating_point():
            x.requires_grad_()
    if trains:
        outputs = flat(call(layer.train(), *inputs))
        for number, output in enumerate(outputs):
            put(f"{name}/train/{number}", output)
        weighted_sum(outputs).backward()
        for key, parameter in layer.named_parameters():
            put(f"{name}/grad/{key}", parameter.grad)
        for number, x in enumerate(inputs):
            if x.is_floating_point():
                put(f"{name}/grad_in/{number}", x.grad)
        for key, value in layer.named_buffers():
            put(f"{name}/after/{key}", value)
    with torch.no_grad():
        for number, output in enumerate(flat(call(layer.eval(), *inputs))):
            put(f"{name}/eval/{number}", output)


def spread(name, make):
    torch.manual_seed(SEED)
    for key, value in make().state_dict().items():
        value = value.double()
        numbers = [value.min(), value.max(), value.mean(), value.std(correction=0)]
        put(f"{name}/spread/{key}", torch.stack(numbers))


def floats(*shapes):
    return lambda: [torch.randn(*shape) for shape in shapes]


def integers(bound, *shape):
    return lambda: [torch.randint(bound, shape)]


case("linear", lambda: nn.Linear(5, 3), floats((4, 5)))
case("linear_no_bias", lambda: nn.Linear(5, 3, bias=False), floats((2, 4, 5)))
case("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), floats((2, 4, 9)))
case("conv2d", lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), floats((2, 2, 6, 5)))
case("conv2d_groups", lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), floats((1, 4, 5, 5)))
case("conv2d_same", lambda: nn.Conv2d(2, 2, (4, 3), padding="same", dilation=(1, 2)), floats((1, 2, 7, 6)))
for mode in ("reflect", "replicate", "circular"):
    case(f"conv2d_{mode}", lambda: nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode=mode), floats((1, 2, 5, 4)))
case("conv1d_same_circular", lambda: nn.Conv1d(2, 2, 4, padding="same", padding_mode="circular"), floats((1, 2, 7)))
case("conv3d", lambda: nn.Conv3d(2, 2, 2, padding=1), floats((1, 2, 3, 4, 3)))
case("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 4, 3, stride=2), floats((1, 2, 5)))
case(
    "conv_transpose2d",
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=(1, 0), groups=2, dilation=(1, 2)),
    floats((2, 4, 3, 3)),
)
case("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 1, 2, bias=False), floats((1, 2, 2, 3, 2)))
case("batch_norm1d", lambda: nn.BatchNorm1d(3), floats((5, 3)))
case("batch_norm1d_length", lambda: nn.BatchNorm1d(3, eps=1e-3, momentum=0.3), floats((2, 3, 4)))
case("batch_norm2d", lambda: nn.BatchNorm2d(3), floats((2, 3, 4, 3)))
case("batch_norm2d_average", lambda: nn.BatchNorm2d(3, momentum=None), floats((2, 3, 4, 3)))
case("batch_norm2d_no_bias", lambda: nn.BatchNorm2d(3, bias=False), floats((2, 3, 2, 2)))
case("batch_norm2d_plain", lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False), floats((2, 3, 2, 2)))
case("batch_norm3d", lambda: nn.BatchNorm3d(2), floats((2, 2, 2, 2, 3)))
case("layer_norm", lambda: nn.LayerNorm(6), floats((2, 3, 6)))
case("layer_norm_two", lambda: nn.LayerNorm((3, 4), eps=1e-3, bias=False), floats((2, 3, 4)))
case("layer_norm_plain", lambda: nn.LayerNorm(4, elementwise_affine=False), floats((2, 4)))
case("group_norm", lambda: nn.GroupNorm(2, 4, eps=1e-4), floats((2, 4, 3)))
case("rms_norm", lambda: nn.RMSNorm(6), floats((2, 3, 6)))
case("rms_norm_eps", lambda: nn.RMSNorm((2, 3), eps=1e-2), floats((2, 2, 3)))
# Numbers of up to 15 elements are drawn by another function than those of more.
case("embedding", lambda: nn.Embedding(3, 4), integers(3, 2, 3))
case("embedding_padding", lambda: nn.Embedding(7, 5, padding_idx=-2), integers(7, 2, 6))
case("lstm", lambda: nn.LSTM(3, 4), floats((5, 2, 3)))
case("lstm_deep", lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True), floats((2, 5, 3)))
case("lstm_no_bias", lambda: nn.LSTM(3, 4, bias=False), floats((5, 3)))
case(
    "lstm_state",
    lambda: nn.LSTM(3, 4, num_layers=2),
    floats((5, 2, 3), (2, 2, 4), (2, 2, 4)),
    lambda layer, x, h, c: layer(x, (h, c)),
)
case("gru", lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True), floats((5, 2, 3)))
case("gru_state", lambda: nn.GRU(3, 4, batch_first=True), floats((2, 5, 3), (1, 2, 4)))


def attend(**more):
    return lambda layer, *xs: layer(*(xs if len(xs) == 3 else xs * 3), need_weights=False, **more)



last = torch.zeros(2, 4, dtype=torch.bool)
last[1, 3] = True
causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
biased = torch.linspace(-1, 1, 64).view(4, 4, 4)
case("attention", lambda: nn.MultiheadAttention(6, 2, batch_first=True), floats((2, 4, 6)), attend())
case("attention_length_first", lambda: nn.MultiheadAttention(6, 3), floats((3, 2, 6), (4, 2, 6), (4, 2, 6)), attend())
case(
    "attention_causal",
    lambda: nn.MultiheadAttention(6, 2, bias=False, batch_first=True),
    floats((2, 4, 6)),
    attend(attn_mask=causal, is_causal=True),
)
case(
    "attention_causal_padded",
    lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    floats((2, 4, 6)),
    attend(attn_mask=causal, key_padding_mask=last),
)
case(
    "attention_scores",
    lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    floats((2, 4, 6)),
    attend(attn_mask=biased),
)
case(
    "attention_sizes",
    lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=3, batch_first=True),
    floats((2, 3, 6), (2, 4, 5), (2, 4, 3)),
    attend(),
)
case(
    "attention_weights",
    lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    floats((2, 4, 6)),
    lambda layer, x: layer(x, x, x, attn_mask=causal, average_attn_weights=False),
)
case("attention_alone", lambda: nn.MultiheadAttention(6, 2), floats((4, 6)), attend())

spread("linear", lambda: nn.Linear(300, 200))
spread("conv2d", lambda: nn.Conv2d(16, 32, 5))
spread("conv_transpose2d", lambda: nn.ConvTranspose2d(16, 32, 5))
spread("embedding", lambda: nn.Embedding(200, 64))
spread("lstm", lambda: nn.LSTM(40, 50, num_layers=2))
spread("attention", lambda: nn.MultiheadAttention(64, 4))

# The functions of torch.nn.init.
draws = {
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="tanh"),
    "xavier_uniform": lambda w: nn.init.xavier_uniform_(w, nn.init.calculate_gain("selu")),
    "xavier_normal": nn.init.xavier_normal_,
    "normal": lambda w: nn.init.normal_(w, 1.0, 0.02),
    "orthogonal": lambda w: nn.init.orthogonal_(w, 2.0),
    # By drawing values outside again, and by rejection of even ones.
    "trunc_normal": lambda w: nn.init.trunc_normal_(w, 0.0, 0.02, -0.02, 0.02),
    "trunc_normal_tail": lambda w: nn.init.trunc_normal_(w, 0.0, 1.0, 1.0, 4.0),
    "uniform": lambda w: nn.init.uniform_(w, -2.0, 1.0),
}
for name, draw in draws.items():
    weight = torch.empty(4, 3, 2)
    torch.manual_seed(SEED)
    draw(weight)
    put(f"init/{name}", weight)

torch.manual_seed(SEED)
put("dropout/train", nn.Dropout(0.3)(torch.ones(40)))
torch.manual_seed(SEED)
put("dropout2d/train", nn.Dropout2d(0.5)(torch.ones(2, 6, 2, 2)))

save_file(tensors, sys.argv[1])
