"""The autoencoder against the reference's tensors, and our decode against diffusers' own."""

import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.golden_transformer import relative_difference
from tests.support.golden_weights import load_case
from worker.loading.offload import DECODER_BYTES, DECODER_SCRATCH_BYTES
from worker.model import kernels
from worker.model.autoencoder import (
    Tile,
    decode_frames,
    group_norm_affine,
    set_tiles,
    tile_bytes,
    tiles,
)
from worker.multi_gpu.tiles import ROUNDS_AHEAD

TOLERANCE = 3e-6
LAST_BIT = 2**-23  # of a frame's float32, after the same sums in another order in float64
ONE_FRAME_TOLERANCE = 5e-6  # the portrait encoded once, where the reference encodes it 129 times
DESCRIBED, TENSORS = load_case("vae")
CASES = DESCRIBED["cases"]
ENCODED = [name for name in CASES if CASES[name]["op"] == "encode" and "note" not in CASES[name]]
DECODED = [name for name in CASES if CASES[name]["op"] == "decode"]


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def vae(toy_model: Path) -> Any:
    vae = AutoencoderKLHunyuanVideo.from_pretrained(toy_model / "vae").eval()
    set_tiles(vae)
    return vae


def use_tiles_of(case: dict[str, Any], vae: AutoencoderKLHunyuanVideo) -> None:
    """The tiles that the case was made with, where they are not the ones we always use."""
    if "tile" in case and case["tile"] != vae.tile_sample_min_height:
        vae.enable_tiling(
            tile_sample_min_height=case["tile"],
            tile_sample_min_width=case["tile"],
            tile_sample_min_num_frames=case["tile_frames"],
            tile_sample_stride_height=case["tile"] * 3 // 4,
            tile_sample_stride_width=case["tile"] * 3 // 4,
            tile_sample_stride_num_frames=case["tile_frames"] * 3 // 4,
        )


def to_pixels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("name", ENCODED)
def test_encoding_is_the_reference_s(name: str, vae: Any) -> None:
    case = CASES[name]
    use_tiles_of(case, vae)
    encoded = vae.encode(to_pixels(TENSORS[case["pixels"]])).latent_dist
    frames = case["latent_frames"]
    assert relative_difference(encoded.mean[:, :, frames], TENSORS[case["mean"]]) < TOLERANCE
    assert relative_difference(encoded.logvar[:, :, frames], TENSORS[case["logvar"]]) < TOLERANCE


@pytest.mark.parametrize("name", ["reference", "reference_spatial"])
def test_one_frame_encodes_as_the_reference_s_129_equal_frames(name: str, vae: Any) -> None:
    case = CASES[name]
    use_tiles_of(case, vae)
    encoded = vae.encode(to_pixels(TENSORS[case["pixels"]])).latent_dist
    expected = TENSORS[case["mean"]], TENSORS[case["logvar"]]
    for ours, reference in zip((encoded.mean, encoded.logvar), expected, strict=True):
        assert relative_difference(ours.expand_as(reference), reference) < ONE_FRAME_TOLERANCE
    if "noise" in case:
        sample = encoded.mean + encoded.std * TENSORS[case["noise"]]
        assert relative_difference(sample, TENSORS[case["sample"]]) < ONE_FRAME_TOLERANCE


@pytest.mark.parametrize("name", DECODED)
def test_decoding_is_the_reference_s(name: str, vae: Any) -> None:
    case = CASES[name]
    use_tiles_of(case, vae)
    frames = torch.cat(list(decode_frames(vae, TENSORS[case["z"]])))
    assert len(frames) == case["decoded_frames"]
    expected = (TENSORS[case["sample"]] / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)
    assert relative_difference(frames[case["frames"]], expected) < TOLERANCE


def latents_of(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


def diffusers_frames(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    sample = vae.decode(latents).sample[0].transpose(0, 1)
    return (sample.float() / 2 + 0.5).clamp(0, 1)


def assert_same(frames: Tensor, expected: Tensor) -> None:
    assert frames.shape == expected.shape
    assert (frames - expected).abs().max() <= LAST_BIT


def use_small_tiles(vae: AutoencoderKLHunyuanVideo) -> None:
    use_tiles_of({"tile": 64, "tile_frames": 16}, vae)


@pytest.mark.parametrize("num_latents", [1, 12, 16, 17, 24, 25, 26, 37, 41])
def test_the_stream_is_the_tiled_decode_at_any_length(num_latents: int, vae: Any) -> None:
    latents = latents_of(num_latents, 2, 2)
    streamed = torch.cat(list(decode_frames(vae.double(), latents)))
    assert_same(streamed, diffusers_frames(vae, latents))


@pytest.mark.parametrize("size", [(8, 9), (9, 8), (3, 14), (13, 12), (15, 7)])
def test_spatial_tiles_are_blended_as_diffusers_blends_them(
    size: tuple[int, int], vae: Any
) -> None:
    use_small_tiles(vae.double())
    latents = latents_of(2, *size)
    streamed = torch.cat(list(decode_frames(vae, latents)))
    assert_same(streamed, diffusers_frames(vae, latents))


@pytest.mark.parametrize("scratch_bytes", [0, 100_000, 1_000_000])
def test_the_length_of_the_chunks_changes_nothing(scratch_bytes: int, vae: Any) -> None:
    latents = latents_of(9, 4, 3)
    frames = torch.cat(list(decode_frames(vae.double(), latents, scratch_bytes)))
    assert_same(frames, diffusers_frames(vae, latents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_costs_no_more_than_in_diffusers_decode(dtype: Any, vae: Any) -> None:
    latents = latents_of(3, 4, 6)
    expected = diffusers_frames(vae.double(), latents)
    (ours,) = decode_frames(vae.to(dtype), latents)
    theirs = diffusers_frames(vae, latents.to(dtype))
    assert relative_difference(ours, expected) < 1.1 * relative_difference(theirs, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("scratch_bytes", [0, 2**28])
def test_a_gpu_decodes_the_same_frames(scratch_bytes: int, vae: Any) -> None:
    use_small_tiles(vae.double())
    latents = latents_of(6, 9, 12)
    expected = diffusers_frames(vae, latents)
    vae.to("cuda", torch.float16)
    theirs = diffusers_frames(vae, latents.to("cuda", torch.float16)).cpu()
    frames = torch.cat(list(decode_frames(vae, latents.to("cuda"), scratch_bytes))).cpu()
    assert relative_difference(frames, expected) < 1.1 * relative_difference(theirs, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("channels", [16, 128, 512])
def test_the_kernels_give_what_torch_s_operators_give(
    channels: int, factor: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(3)
    chunk = torch.randn(1, channels, 3, 33, 47, generator=generator).half()
    chunk = chunk.to(memory_format=torch.channels_last_3d)
    time, down, across = factor
    size = (1, channels, 3 * time, 33 * down + 2, 47 * across + 2)
    target = torch.empty(size, dtype=torch.float16, memory_format=torch.channels_last_3d)
    assert kernels.kernels_for_chunk(chunk.cuda()) is not None
    scale, shift = torch.randn(2, 1, channels, 1, 1, 1, generator=generator)
    affine = (scale, shift)
    for given in (None, affine) if factor == (1, 1, 1) else (None,):
        on_gpu = target.cuda()
        given_on_gpu = given and (given[0].cuda(), given[1].cuda())
        kernels.padded_chunk(chunk.cuda(), on_gpu, factor, given_on_gpu)
        kernels.padded_chunk(chunk, target, factor, given)
        assert relative_difference(on_gpu.cpu(), target) <= (1e-3 if given else 0)
    sums = (kernels.channel_sums(given) for given in (chunk.cuda(), chunk))
    for ours, plain in zip(*sums, strict=True):
        assert relative_difference(ours.cpu(), plain) < 1e-5


def test_the_statistics_of_a_full_size_tile_are_exact() -> None:
    norm = torch.nn.GroupNorm(4, 8)
    chunk = torch.randn(1, 8, 4, 256, 256, generator=torch.Generator().manual_seed(3)) + 1
    groups = chunk.double().view(4, -1)
    deviation = (groups.var(1, correction=0) + norm.eps).sqrt().repeat_interleave(2)
    affine = group_norm_affine(norm, chunk.split(3, 2))
    assert relative_difference(affine.scale.flatten(), 1 / deviation) < 1e-7


def test_frames_leave_before_later_ones_are_decoded(vae: Any) -> None:
    decoded = []
    vae.post_quant_conv.register_forward_hook(lambda *_: decoded.append("tile"))
    chunks = decode_frames(vae, latents_of(33, 2, 2))
    assert len(next(chunks)) == 49
    assert decoded == ["tile"]
    assert [len(chunk) for chunk in chunks] == [48, 32]


@pytest.mark.parametrize(
    ("num_frames", "lengths"),
    [(1, [1]), (49, [49]), (50, [49, 1]), (97, [49, 48]), (98, [49, 48, 1]), (200, [49, 48, 32])],
)
def test_what_lies_beyond_the_last_frame_is_not_decoded(
    num_frames: int, lengths: list[int], vae: Any
) -> None:
    decoded = []
    vae.post_quant_conv.register_forward_hook(lambda *_: decoded.append("tile"))
    chunks = list(decode_frames(vae, latents_of(33, 1, 1), num_frames=num_frames))
    assert [len(chunk) for chunk in chunks] == lengths
    assert len(decoded) == len(lengths)


def test_frames_are_the_same_whoever_decodes_the_tiles_and_when(vae: Any) -> None:
    use_small_tiles(vae)
    latents = latents_of(6, 4, 9)  # two steps in time of two tiles each

    def backwards(decode: Callable[[Tile], Tensor], tiles: list[Tile]) -> Iterator[Tensor]:
        decoded = [decode(tile).contiguous() for tile in reversed(tiles)]
        shapes = [tuple(each.shape) for each in reversed(decoded)]
        assert shapes == [tile.decoded_shape for tile in tiles]
        return reversed(decoded)

    shared = torch.cat(list(decode_frames(vae, latents, tile_map=backwards)))
    assert torch.equal(shared, torch.cat(list(decode_frames(vae, latents))))


def test_frames_are_float32_whatever_the_autoencoder_runs_in(vae: Any) -> None:
    (frames,) = decode_frames(vae.to(torch.bfloat16), latents_of(2, 2, 2))
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() <= frames.max() <= 1


def test_decoding_leaves_the_weights_as_they_are_stored(vae: Any) -> None:
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    list(decode_frames(vae, latents_of(2, 2, 2)))
    for name, weight in vae.state_dict().items():
        assert weight.is_contiguous(), name  # or it could not be saved
        assert torch.equal(weight, before[name])


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in it and live at the same time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
            self.bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.bytes -= num_bytes


@pytest.fixture(scope="module")
def full_size() -> Any:
    """The published autoencoder's size without its values."""
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo().eval().to(torch.float16)
    set_tiles(vae)
    return vae


def peak_bytes(vae: AutoencoderKLHunyuanVideo, latents: Tensor, scratch_bytes: int) -> int:
    with PeakMemory(latents, *vae.parameters()) as memory:
        for frames in decode_frames(vae, latents, scratch_bytes):
            del frames
    assert memory.bytes == 0
    return memory.peak_bytes


LARGEST = 65 * 256 * 256 * 256 * 2  # bytes; what enters the last block of a full-size tile


def test_a_full_size_tile_takes_little_more_than_its_largest_activation(full_size: Any) -> None:
    latents = torch.empty(1, 16, 17, 32, 32, dtype=torch.float16, device="meta")
    assert peak_bytes(full_size, latents, 0) < 1.1 * LARGEST
    assert peak_bytes(full_size, latents, 2**28) < 1.12 * LARGEST


@pytest.mark.parametrize("scratch_bytes", [0, 2**28, 2**30])
def test_the_memory_of_a_tile_is_known_before(scratch_bytes: int, full_size: Any) -> None:
    latents = torch.empty(1, 16, 16, 32, 32, dtype=torch.float16, device="meta")
    said = tile_bytes(full_size, scratch_bytes)
    assert 0.8 * said < peak_bytes(full_size, latents, scratch_bytes) < said


def test_a_larger_picture_takes_a_tile_and_its_frames(full_size: Any) -> None:
    latents = torch.empty(1, 16, 24, 24, 40, dtype=torch.float16, device="meta")
    step = 65 * 3 * 192 * 320 * 2
    assert peak_bytes(full_size, latents, 2**28) < tile_bytes(full_size, 2**28) + 2 * step


def test_a_memory_plan_has_room_for_the_tiles_that_wait_on_another_gpu(full_size: Any) -> None:
    latents = torch.empty(1, 16, 17, 32, 32, dtype=torch.float16, device="meta")
    tile, *_ = tiles(full_size, latents)
    waiting = (ROUNDS_AHEAD + 1) * math.prod(tile.decoded_shape) * tile.latents.itemsize
    assert tile_bytes(full_size, DECODER_SCRATCH_BYTES) + waiting < DECODER_BYTES
