"""Linear layers: those that compute in more bits than they are stored in, and those in fewer.

Shape letters: N tokens, I and O features in and out.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from worker.model.kernels import FLOAT8, gelu_in_place, quantize_per_token

logger = logging.getLogger(__name__)

LARGEST_FLOAT8_ERROR = 0.06  # relative norm of a product of normal values; right ones come to 0.037
FEED_FORWARD_TOKENS = 24_576  # at a time: more are no quicker, and take memory


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


@dataclass(frozen=True)
class Rows:
    """Activations, and the same in 8 bits for the layers that compute in them."""

    values: Tensor  # (B, N, I)
    quantized: tuple[Tensor, Tensor] | None = None  # of one sample: (N, I) e4m3, (N, 1) scales

    @classmethod
    def of(cls, values: Tensor, *, float8: bool) -> "Rows":
        """The rows, with `float8` in 8 bits too."""
        return cls(values, quantize_per_token(values[0]) if float8 else None)

    def part(self, tokens: slice) -> "Rows":
        """Those of some tokens."""
        quantized = self.quantized and (self.quantized[0][tokens], self.quantized[1][tokens])
        return Rows(self.values[:, tokens], quantized)


ALL = slice(None)


def project(
    layer: Any, rows: Rows, columns: slice = ALL, *, bias: bool = True, out: Tensor | None = None
) -> Tensor:  # (B, N, O)
    """What the layer makes of the rows: in 8 bits if they are there and the layer is plain.

    Args:
        columns: the features of the layer that the rows are; the layer then must be plain.
        bias: whether its bias is added; likewise.
        out: where to write it; then without gradients, and of one sample.

    Differs from upstream in 8 bits: weights are scaled by output channel and activations by token
    to e4m3, which is off by at most 1/16 of each value; sums are in float32.
    """
    if not is_plain(layer):
        assert columns == ALL
        assert bias
        result: Tensor = layer(rows.values)
        return result if out is None else out.copy_(result)
    added = layer.bias if bias else None
    matrix = None if out is None else out[0]
    if rows.quantized is not None:
        values, scale = rows.quantized
        weight, weight_scale = _float8_weight(layer, columns)
        return torch._scaled_mm(
            values,
            weight.t(),
            scale_a=scale,
            scale_b=weight_scale.t(),
            bias=added,
            out_dtype=rows.values.dtype,
            use_fast_accum=True,
            out=matrix,
        )[None]
    weight = _weight(layer, columns, rows.values.dtype)
    if out is None:
        return linear(rows.values, weight, added)
    if added is None:
        torch.mm(rows.values[0], weight.t(), out=matrix)
    else:
        torch.addmm(added, rows.values[0], weight.t(), out=matrix)
    return out


def feed_forward(
    up: Any,
    down: Any,
    rows: Rows,
    columns: slice = ALL,
    *,
    bias: bool = True,
    out: Tensor | None = None,
) -> Tensor:  # (B, N, O)
    """`down(gelu(up(rows)))`, some tokens at a time, so that the wide middle is never whole.

    All at once where a gradient is wanted, which keeps the middle, or of several samples.

    Args:
        columns, bias, out: of `down`, as for `project`.
    """
    batch, num_tokens, _ = rows.values.shape
    if num_tokens <= FEED_FORWARD_TOKENS or torch.is_grad_enabled() or batch > 1:
        return _fed(up, down, rows, columns, bias, out)
    if out is None:
        out = rows.values.new_empty(batch, num_tokens, down.out_features)
    for start in range(0, num_tokens, FEED_FORWARD_TOKENS):
        some = slice(start, start + FEED_FORWARD_TOKENS)
        _fed(up, down, rows.part(some), columns, bias, out[:, some])
    return out


def _fed(
    up: Any, down: Any, rows: Rows, columns: slice, bias: bool, out: Tensor | None
) -> Tensor:  # (B, N, O)
    wide = project(up, rows)
    if rows.quantized is not None and is_plain(down):
        middle = Rows(wide, quantize_per_token(wide[0], of_gelu=True))
    else:
        middle = Rows(gelu_in_place(wide))
    return project(down, middle, columns, bias=bias, out=out)


def float8_works(device: torch.device) -> bool:
    """Whether products in 8 bits run on this device and come out right."""
    generator = torch.Generator().manual_seed(0)
    width = 3072  # the published model's: its kernels are compiled once
    layer = nn.Linear(width, 768, dtype=torch.bfloat16)
    values = torch.randn(1, 640, width, generator=generator).to(device, torch.bfloat16)
    layer.weight.data = torch.randn(768, width, generator=generator).to(layer.weight)
    layer.to(device)
    with torch.no_grad():
        exact = layer(values).float()
        try:
            found = project(layer, Rows.of(values, float8=True)).float()
        except RuntimeError as error:
            logger.info("no products in 8 bits: %s", str(error).partition("\n")[0])
            return False
    return bool((found - exact).norm() < LARGEST_FLOAT8_ERROR * exact.norm())


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is its weight and bias alone: no adapter, and no hook of a library."""
    return type(layer) in (nn.Linear, Float8Linear) and "forward" not in vars(layer)


def _weight(layer: nn.Linear, columns: slice, dtype: torch.dtype) -> Tensor:  # (O, I)
    weight = layer.weight[:, columns]
    if isinstance(layer, Float8Linear):
        return dequantize(weight, layer.weight_scale).to(dtype)
    return weight


def _float8_weight(layer: nn.Linear, columns: slice) -> tuple[Tensor, Tensor]:
    """The weight (O, I) in e4m3 and its scales (O, 1) float32.

    One that is stored in bfloat16 is scaled each time: that takes a hundredth of the product.
    """
    weight = layer.weight[:, columns]
    if isinstance(layer, Float8Linear):
        return weight.contiguous().view(FLOAT8), layer.weight_scale.float()
    return quantize_per_token(weight)


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
