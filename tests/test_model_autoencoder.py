import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from tests.goldens.transformer import relative_difference
from tests.goldens.weights import load_case
from worker.model.autoencoder import decode_frames, set_tiles

TOLERANCE = 3e-6
ONE_FRAME_TOLERANCE = 5e-6  # the portrait encoded once, where the reference encodes it 129 times
DESCRIBED, TENSORS = load_case("vae")
CASES = DESCRIBED["cases"]
ENCODED = [name for name in CASES if CASES[name]["op"] == "encode" and "note" not in CASES[name]]
DECODED = [name for name in CASES if CASES[name]["op"] == "decode"]


@pytest.fixture(scope="module", autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def vae(toy_model):
    vae = AutoencoderKLHunyuanVideo.from_pretrained(toy_model / "vae").eval()
    set_tiles(vae)
    return vae


def use_tiles_of(case: dict, vae: AutoencoderKLHunyuanVideo) -> None:
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
        vae.use_framewise_decoding = True


def to_pixels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("name", ENCODED)
def test_encoding_is_the_reference_s(name, vae):
    case = CASES[name]
    use_tiles_of(case, vae)
    encoded = vae.encode(to_pixels(TENSORS[case["pixels"]])).latent_dist
    frames = case["latent_frames"]
    assert relative_difference(encoded.mean[:, :, frames], TENSORS[case["mean"]]) < TOLERANCE
    assert relative_difference(encoded.logvar[:, :, frames], TENSORS[case["logvar"]]) < TOLERANCE


@pytest.mark.parametrize("name", ["reference", "reference_spatial"])
def test_one_frame_encodes_as_the_reference_s_129_equal_frames(name, vae):
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
def test_decoding_is_the_reference_s(name, vae):
    case = CASES[name]
    use_tiles_of(case, vae)
    latents = TENSORS[case["z"]]
    if case.get("tile", 256) == 256:
        frames = torch.cat(list(decode_frames(vae, latents)))
        assert len(frames) == case["decoded_frames"]
        expected = (TENSORS[case["sample"]] / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)
        assert relative_difference(frames[case["frames"]], expected) < TOLERANCE
    else:
        sample = vae.decode(latents).sample[:, :, case["frames"]]
        assert relative_difference(sample, TENSORS[case["sample"]]) < TOLERANCE


@pytest.mark.parametrize("num_latents", [1, 12, 16, 17, 24, 25, 26, 37, 41])
def test_the_stream_is_the_tiled_decode_at_any_length(num_latents, vae):
    latents = torch.randn(1, 4, num_latents, 2, 2, generator=torch.Generator().manual_seed(3))
    streamed = torch.cat(list(decode_frames(vae, latents)))
    vae.use_framewise_decoding = True
    whole = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)
    assert torch.equal(streamed, whole)


def test_frames_leave_before_later_ones_are_decoded(vae):
    latents = torch.randn(1, 4, 33, 2, 2, generator=torch.Generator().manual_seed(3))
    decoded = []
    vae.decoder.register_forward_hook(lambda *_: decoded.append("tile"))
    chunks = decode_frames(vae, latents)
    assert len(next(chunks)) == 49
    assert decoded == ["tile"]
    assert [len(chunk) for chunk in chunks] == [48, 32]


def test_frames_are_float32_whatever_the_autoencoder_runs_in(vae):
    latents = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(3))
    (frames,) = decode_frames(vae.to(torch.bfloat16), latents)
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() <= frames.max() <= 1
