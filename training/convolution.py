"""Causal convolutions that train fast.

The numbers are those of diffusers' own modules. What differs: replicate padding by joining slices,
2-d convolutions, to which the frames of a kernel are so many channels more, and weights kept as
matrices, for Muon.
"""

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import Tensor, nn
from torch.nn.functional import conv2d


class FastCausalConv3d(nn.Module):
    """Replaces a causal convolution while it is trained."""

    def __init__(self, conv: nn.Conv3d, has_padding: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1))
        assert conv.bias is not None
        self.bias = nn.Parameter(conv.bias.detach().clone())
        self._shape = conv.weight.shape
        self._stride = list(conv.stride)
        self._has_padding = has_padding

    @torch.no_grad()
    def use_last_tap(self, *, mixes_two: bool) -> None:
        """Puts all of the kernel into its last tap in time, or half into each of the last two."""
        kernel = self.weight.view(self._shape)  # (O, I, taps, height, width)
        if kernel.shape[2] == 3:
            whole = kernel.sum(2)
            kernel.zero_()
            kernel[:, :, 2] = whole / 2 if mixes_two else whole
            if mixes_two:
                kernel[:, :, 1] = whole / 2

    def forward(self, x: Tensor) -> Tensor:
        """The same as the module that it replaces."""
        weight = self.weight.view(self._shape)  # (O, I, taps, height, width)
        stride, *stride_in_frame = self._stride
        if x.shape[2] == 1:  # all its taps in time see the one frame
            frame = _pad(_pad(x[:, :, 0], 2), 3) if self._has_padding else x[:, :, 0]
            return conv2d(frame, weight.sum(2), self.bias, stride_in_frame)[:, :, None]
        frames = x.transpose(1, 2)  # (B, F, I, H, W)
        if self._has_padding:
            first = frames[:, :1]
            frames = _pad(_pad(torch.cat([first, first, frames], dim=1), 3), 4)
        taps = weight.shape[2]
        last = frames.shape[1] - taps  # of the places of the first tap
        seen = torch.cat(
            [frames[:, tap : last + tap + 1 : stride] for tap in range(taps)], dim=2
        )  # (B, F, taps * I, H, W)
        kernel = weight.transpose(1, 2).flatten(1, 2)
        out = conv2d(seen.flatten(0, 1), kernel, self.bias, stride_in_frame)
        return out.unflatten(0, (len(x), -1)).transpose(1, 2)


def inflate_kernels(vae: AutoencoderKLHunyuanVideo) -> None:
    """Inflates the temporal kernels of a model that was trained on single frames, at no loss.

    A kernel in time becomes its last tap alone, which makes every fourth frame a latent; where the
    decoder doubles the frames it is half of each of the last two taps, which draws the frames
    between two latents as mixtures of both. A single frame comes out as before.
    """
    for name, module in vae.named_modules():
        if isinstance(module, FastCausalConv3d):
            parent = vae.get_submodule(name.rpartition(".")[0])
            factor = getattr(parent, "upsample_factor", None)
            module.use_last_tap(mixes_two=factor is not None and factor[0] == 2)


def _pad(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)


def use_fast_convolutions(vae: AutoencoderKLHunyuanVideo) -> None:
    """Replaces the model's own causal convolutions by those that train fast."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HunyuanVideoCausalConv3d):
                conv = child.conv
                setattr(module, name, FastCausalConv3d(conv, conv.kernel_size[0] == 3))


def with_library_convolutions(
    state: dict[str, Tensor], vae: AutoencoderKLHunyuanVideo
) -> AutoencoderKLHunyuanVideo:
    """Loads the trained state into a model that has the library's convolutions; returns it."""
    stored = {}
    for name, like in vae.state_dict().items():
        trained = name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias")
        value = state[name] if name in state else state[trained]
        stored[name] = value.view(like.shape)
    vae.load_state_dict(stored)
    return vae
