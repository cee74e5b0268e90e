"""The point-wise work of the blocks: each function in one pass over memory on a GPU.

On a CUDA device and in bfloat16, or in float16 for the autoencoder, the kernels of `kernels.cu` do
it, which NVRTC compiles when they are first needed: a second once a process, whatever the sizes,
and without a compiler installed. Anywhere else, and where a gradient is wanted, torch's operators
do the same. Shape letters: B samples (the kernels take one), N tokens, D width, h heads; of the
autoencoder's chunks C channels, f frames, H rows and W columns.
"""

import ctypes
import functools
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

logger = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
ELEMENTWISE_THREADS = 256
HEAD_THREADS, WIDTHS_OF_HEADS = 128, (64, 128, 256)
WIDEST = 8 * 1024  # of a row: eight values a thread
SUMMED_PIXELS = 1024  # by a block
MOST_BLOCKS, CHOICES_A_BLOCK = 2048, 4  # of keys; rows of scores by a block of threads


def adaln_modulate(
    x: Tensor,  # (B, N, D)
    shift: Tensor,  # (B, D), as is scale
    scale: Tensor,
    eps: float,
) -> Tensor:  # (B, N, D)
    """Adaptive layer norm (adaLN): layer norm, then `* (1 + scale) + shift`."""
    kernels = _kernels_for_rows(x)
    if kernels is None:
        return layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    out = torch.empty_like(x)
    kernels.launch("adaln_modulate", x.shape[1], kernels.threads, x, shift, scale, out, eps)
    return out


def gated_residual_adaln(
    x: Tensor,  # (B, N, D), as is y
    y: Tensor,
    gate: Tensor,  # (B, D), as are shift and scale
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # 2 x (B, N, D)
    """`x + gate * y`, and adaLN of it."""
    kernels = _kernels_for_rows(x)
    if kernels is None:
        total = x + gate[:, None] * y
        return total, adaln_modulate(total, shift, scale, eps)
    total, out = torch.empty_like(x), torch.empty_like(x)
    tensors = (x, y, gate, shift, scale, total, out)
    kernels.launch("gated_residual_adaln", x.shape[1], kernels.threads, *tensors, eps)
    return total, out


def gated_residual(
    x: Tensor,  # (B, N, D), as are y and z
    y: Tensor,
    gate: Tensor,  # (B, D)
    z: Tensor | None = None,
) -> Tensor:  # (B, N, D)
    """`x + gate * (y + z)`."""
    kernels = _kernels_for_rows(x)
    if kernels is None:
        return x + gate[:, None] * (y if z is None else y + z)
    out = torch.empty_like(x)
    kernels.launch("gated_residual", x.shape[1], kernels.threads, x, y, z, gate, out)
    return out


def norm_and_rotate(
    x: Tensor,  # (B, N, h, D/h), all heads of a row or some
    norm: Any,  # an RMS norm over D/h
    rotary: tuple[Tensor, Tensor] | None,  # cosines and sines, 2 x (N, D/h) float32
    out: Tensor,  # (B, N, h, D/h)
) -> None:
    """Normalises each head and rotates it by its token's position (RoPE), into a given tensor."""
    _, tokens, heads, head = x.shape
    kernels = None
    if x.stride()[2:] == (head, 1) and out.is_contiguous() and head in WIDTHS_OF_HEADS:
        kernels = _kernels_for(x, x.stride(1), head) if len(x) == 1 else None
    if kernels is None or x.dtype != norm.weight.dtype:
        normed = norm(x)
        out.copy_(normed if rotary is None else _rotated(normed, *rotary))
        return
    tensors = (norm.weight, *(rotary or (None, None)), out)
    strided = (x, x.stride(1) // 8)
    kernels.launch("norm_and_rotate", tokens, HEAD_THREADS, *strided, *tensors, heads, norm.eps)


def joined(first: Tensor, second: Tensor) -> Tensor:  # (B, N, ...), (B, M, ...) -> (B, N + M, ...)
    """One behind the other: copied only where they do not lie so."""
    whole = side_by_side(first, second)
    return torch.cat([first, second], dim=1) if whole is None else whole


def side_by_side(first: Tensor, second: Tensor) -> Tensor | None:
    """What both are the parts of, if they are and no gradient is wanted; shapes as `joined`."""
    apart = second.data_ptr() != first.data_ptr() + first.nbytes
    is_whole = len(first) == 1 and first.is_contiguous() and second.is_contiguous()
    if torch.is_grad_enabled() or apart or not is_whole or first.dtype != second.dtype:
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    length = first.shape[1] + second.shape[1]
    return first.as_strided((1, length, *first.shape[2:]), first.stride())


def gelu_in_place(x: Tensor) -> Tensor:  # of any shape
    """GELU by tanh, in the place of `x` where that is quick."""
    count = x.numel() // 8
    kernels = _kernels_for(x) if x.is_contiguous() and x.numel() % 8 == 0 else None
    if kernels is None:
        return gelu(x, approximate="tanh")
    blocks = math.ceil(count / ELEMENTWISE_THREADS)
    kernels.launch("gelu_in_place", blocks, ELEMENTWISE_THREADS, x, count)
    return x


def quantize_per_token(
    x: Tensor,  # (N, D); the rows may lie apart
    *,
    of_gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # (N, D) float8_e4m3fn, (N, 1) float32
    """The rows, or their GELU by tanh, in 8 bits, each with the scale to multiply it by."""
    rows, width = x.shape
    kernels = _kernels_for(x, width // 4) if width % 4 == 0 and x.stride(1) == 1 else None
    if kernels is None or not kernels.has_float8:
        x = (gelu(x, approximate="tanh") if of_gelu else x).float()
        scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / torch.finfo(FLOAT8).max
        return (x / scale).to(FLOAT8), scale
    out = torch.empty(rows, width, dtype=FLOAT8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    name = "quantize_gelu_per_token" if of_gelu else "quantize_per_token"
    kernels.launch(name, rows, kernels.threads, x, x.stride(0) // 8, out, scale)
    return out, scale


def padded_chunk(
    chunk: Tensor,  # (1, C, f, H, W)
    target: Tensor,  # (1, C, time * f, down * H + 2, across * W + 2)
    factor: tuple[int, int, int] = (1, 1, 1),  # time, down, across
    affine: tuple[Tensor, Tensor] | None = None,  # shift and scale, (1, C, 1, 1, 1) each
) -> None:
    """Fills the target: SiLU of `shift + scale * chunk`, or without those the chunk enlarged.

    Its border of one pixel repeats the edge.
    """
    time, down, across = factor
    kernels = kernels_for_chunk(chunk)
    if kernels is not None:
        _, channels, _, height, width = chunk.shape
        blocks = target.shape[2] * target.shape[3]
        sizes = (channels // 8, height, width, *factor)
        tensors = (chunk, *(affine or (None, None)), target)
        kernels.launch("padded_chunk", blocks, ELEMENTWISE_THREADS, *tensors, *sizes)
        return
    inner = target[..., 1:-1, 1:-1]
    if affine is not None:
        torch.addcmul(affine[0], chunk, affine[1], out=inner)
    else:
        copies = inner.unflatten(4, (-1, across)).unflatten(3, (-1, down)).unflatten(2, (-1, time))
        copies.copy_(chunk[:, :, :, None, :, None, :, None])
    for edge, beside in ((0, 1), (-1, -2)):
        target[..., 1:-1, edge] = target[..., 1:-1, beside]
    for edge, beside in ((0, 1), (-1, -2)):
        target[..., edge, :] = target[..., beside, :]
    if affine is not None:
        silu(target, inplace=True)


def channel_sums(chunk: Tensor) -> tuple[Tensor, Tensor]:  # (1, C, f, H, W) -> 2 x (C, f)
    """The sum of each channel in each frame, and that of its squares, in float32 at least."""
    kernels = kernels_for_chunk(chunk)
    if kernels is None:
        precise = torch.promote_types(chunk.dtype, torch.float32)
        pixels = chunk.permute(0, 2, 3, 4, 1)  # as they lie: over other strides a CPU sums slowly
        # by rows: on a CPU a norm adds one number after the other, and a whole frame of them costs
        # two digits; a square of the chunk would lie in memory
        squares = torch.linalg.vector_norm(pixels, dim=3, dtype=precise).square_()
        return pixels.flatten(2, 3).sum((0, 2), dtype=precise).t(), squares.sum((0, 2)).t()
    _, channels, frames, height, width = chunk.shape
    parts = math.ceil(height * width / SUMMED_PIXELS)
    sums = torch.empty((2, frames, parts, channels), dtype=torch.float32, device=chunk.device)
    sizes = (channels // 8, height * width, parts, SUMMED_PIXELS)
    kernels.launch("channel_sums", frames * parts, ELEMENTWISE_THREADS, chunk, *sums, *sizes)
    total, squares = sums.sum(2).transpose(1, 2)
    return total, squares


def choose_blocks(
    scores: Tensor,  # (h, q, k) float32: logarithms of what keys weigh for queries, both in blocks
    required: Tensor,  # (q, k) bool: chosen in any case
    dense: Tensor,  # (q,) bool: these see all
    mass: float,  # what the chosen blocks weigh together, of 1
) -> tuple[Tensor, Tensor, Tensor]:  # (h, q, k) bool, (h, q) int32, (h, q, k) int32
    """The fewest blocks of that mass: which they are, how many, and their indices in order.

    Of indices only so many count as were chosen; what lies behind them means nothing.
    """
    heads, query_blocks, key_blocks = scores.shape
    kernels = compiled(scores.device.index, 256, 128) if scores.is_cuda else None
    if kernels is None or key_blocks > MOST_BLOCKS:
        chosen = _chosen_blocks(scores.softmax(-1), required, mass) | dense[:, None]
        counts = chosen.sum(-1, dtype=torch.int32)
        return chosen, counts, (~chosen).byte().argsort(dim=-1, stable=True).int()
    chosen = torch.empty_like(scores, dtype=torch.bool)
    counts = torch.empty(heads, query_blocks, dtype=torch.int32, device=scores.device)
    indices = torch.empty_like(scores, dtype=torch.int32)
    rows = heads * query_blocks
    blocks = math.ceil(rows / CHOICES_A_BLOCK)
    tensors = (scores.contiguous(), required, dense, chosen, counts, indices)
    sizes = (rows, query_blocks, key_blocks)
    kernels.launch("choose_blocks", blocks, 32 * CHOICES_A_BLOCK, *tensors, *sizes, mass)
    return chosen, counts, indices


def _chosen_blocks(shares: Tensor, required: Tensor, mass: float) -> Tensor:  # (h, q, k) bool
    """Those required, and then the heaviest until the mass is reached."""
    order = shares.masked_fill(required, 2).argsort(dim=-1, descending=True)
    ordered = shares.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    heaviest = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, before < mass)
    return heaviest | required


def merge_attended(
    out: Tensor,  # (1, N, h, D/h), as is other
    other: Tensor,
    sums: Tensor,  # (1, h, N) float32, logarithms of softmax's sums, as is other_sums
    other_sums: Tensor,
    bias: float,  # added to the other's
) -> Tensor:  # (1, N, h, D/h)
    """Attention over the keys of both, from that over each; in the place of `out` on a GPU."""
    _, tokens, heads, head = out.shape
    kernels = _kernels_for(out, heads * head, head) if out.is_contiguous() else None
    if kernels is None:
        share = torch.sigmoid(other_sums + bias - sums).transpose(1, 2)[..., None]
        return torch.where(share > 0, out + share * (other - out), out).to(out.dtype)
    blocks = math.ceil(out.numel() / 8 / ELEMENTWISE_THREADS)
    tensors = (out, other.contiguous(), sums.contiguous(), other_sums.contiguous())
    sizes = (bias, tokens, heads)
    kernels.launch("merge_attended", blocks, ELEMENTWISE_THREADS, *tensors, *sizes)
    return out


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Pairs of neighbours turned, in float32: (1, N, h, D/h)."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cosines[:, None] + across * sines[:, None]).to(x.dtype)


def _kernels_for_rows(x: Tensor) -> "CompiledKernels | None":
    """The kernels that take a block of threads for each token of one sample."""
    return _kernels_for(x, x.shape[-1]) if len(x) == 1 and x.is_contiguous() else None


def _kernels_for(x: Tensor, width: int = 256, head: int = 128) -> "CompiledKernels | None":
    """The kernels for rows of that width; None where torch has to do."""
    fits = width % 8 == 0 and width <= WIDEST and head % 64 == 0
    if not (fits and x.is_cuda and x.dtype == torch.bfloat16) or torch.is_grad_enabled():
        return None
    if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:-1]):
        return None  # they read 16 bytes at a time
    return compiled(x.device.index, width, head)


def kernels_for_chunk(chunk: Tensor) -> "CompiledKernels | None":
    """The kernels for the autoencoder's chunks; None where torch has to do."""
    eighths, rest = divmod(chunk.shape[1], 8)
    fits = rest == 0 and eighths > 0 and ELEMENTWISE_THREADS % eighths == 0
    if not (fits and chunk.is_cuda and chunk.dtype == torch.float16) or torch.is_grad_enabled():
        return None
    is_last = chunk.is_contiguous(memory_format=torch.channels_last_3d)
    if not is_last or chunk.data_ptr() % 16:
        return None
    return compiled(chunk.device.index, 256, 128)


@functools.cache
def compiled(device: int, width: int, head: int) -> "CompiledKernels | None":
    """The kernels for that GPU, rows of that width and heads of that; None: they do not compile."""
    try:
        return CompiledKernels(device, width, head)
    except Exception as error:
        logger.warning("the kernels could not be compiled, torch's operators serve: %s", error)
        return None


class CompiledKernels:
    """The compiled kernels for one GPU and width."""

    def __init__(self, device: int, width: int, head: int) -> None:
        from cuda.bindings import driver

        self.threads = 32 * math.ceil(width / 8 / 32)  # of a row
        capability = torch.cuda.get_device_capability(device)
        self.has_float8 = capability >= (8, 9)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context the current one
            binary = _compile(capability, width, head)
            (self._module,) = _checked(driver.cuModuleLoadData(binary))
        self._functions: dict[str, Any] = {}
        self._driver = driver

    def launch(
        self, name: str, blocks: int, threads: int, *arguments: Tensor | float | None
    ) -> None:
        """Runs a kernel on the current stream. An int is given as a long long, None as null."""
        if name not in self._functions:
            function = self._driver.cuModuleGetFunction(self._module, name.encode())
            (self._functions[name],) = _checked(function)
        values, kinds = zip(*map(_parameter, arguments), strict=True)
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            self._driver.cuLaunchKernel(
                self._functions[name], blocks, 1, 1, threads, 1, 1, 0, stream, (values, kinds), 0
            )
        )


def _compile(capability: tuple[int, int], width: int, head: int) -> bytes:
    """The binary of `kernels.cu` for GPUs of that compute capability.

    Raises:
        RuntimeError: the compiler's log.
    """
    from cuda.bindings import nvrtc

    source = Path(__file__).with_suffix(".cu").read_bytes()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(source, b"kernels.cu", 0, [], []))
    sizes = {"WIDTH": width, "HEAD": head, "HEAD_THREADS": HEAD_THREADS}
    options = ["-arch=sm_{}{}".format(*capability)]
    options += [f"-D{name}={value}" for name, value in sizes.items()]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(failed):
        (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode(errors="replace"))
    (size,) = _checked(nvrtc.nvrtcGetCUBINSize(program))
    binary = b" " * size
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary


def _parameter(value: Tensor | float | None) -> tuple[float, Any]:
    """A kernel's argument and its kind."""
    if isinstance(value, Tensor):
        return value.data_ptr(), ctypes.c_void_p
    if value is None:
        return 0, ctypes.c_void_p
    return value, ctypes.c_longlong if isinstance(value, int) else ctypes.c_float


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver gave.

    Raises:
        RuntimeError: it failed.
    """
    error, *values = answer
    if int(error):
        raise RuntimeError(f"CUDA: {error}")
    return tuple(values)
