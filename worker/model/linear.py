"""Linear layers that compute in more bits than they are stored in."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FLOAT8 = torch.float8_e4m3fn


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever its weights are stored in."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear(hidden_states.float(), self.weight.float(), bias)


class Float8Linear(nn.Linear):
    """A linear layer whose weight is `weight.to(bfloat16) * weight_scale`, rounded to bfloat16.

    `weight` holds the bits of e4m3 values as uint8, so that no cast of the module to another
    floating type can touch them.
    """

    weight_scale: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        bits = torch.zeros(out_features, in_features, dtype=torch.uint8)
        self.weight = nn.Parameter(bits, requires_grad=False)
        scale = torch.ones(out_features, 1)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = dequantize(self.weight, self.weight_scale).to(hidden_states.dtype)
        return linear(hidden_states, weight, self.bias)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The bits (uint8) of a weight in e4m3 and its scales (out_features, 1), bfloat16."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    largest = largest.clamp(min=1e-30)  # a row of zeros has a scale, too
    scale = (largest / torch.finfo(FLOAT8).max).to(torch.bfloat16)
    limit = torch.finfo(FLOAT8).max  # the rounded scale may be a little small
    values = (weight.float() / scale.float()).clamp(-limit, limit).to(FLOAT8)
    return values.view(torch.uint8), scale


def dequantize(bits: Tensor, scale: Tensor) -> Tensor:
    """The weight in bfloat16."""
    return bits.view(FLOAT8).to(torch.bfloat16) * scale.to(torch.bfloat16)


def replace_linears(
    module: nn.Module,
    linear_class: type[nn.Linear],
    kept: tuple[type[nn.Module], ...] = (),
) -> None:
    """Puts an empty layer of that class in the place of each linear one outside `kept` modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            has_bias = child.bias is not None
            with child.weight.device:
                replacement = linear_class(child.in_features, child.out_features, has_bias)
            setattr(module, name, replacement)
        elif not isinstance(child, kept):
            replace_linears(child, linear_class, kept)
