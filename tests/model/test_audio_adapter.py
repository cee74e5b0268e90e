import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.model.audio_adapter import AudioAdapter, AudioProjection

WIDTH = 8


@pytest.fixture
def adapter() -> AudioAdapter:
    torch.manual_seed(0)
    return AudioAdapter(WIDTH, attention_dim=16).double()


@pytest.fixture
def projection() -> AudioProjection:
    torch.manual_seed(0)
    return AudioProjection((10, 5, 4), 16, WIDTH, tokens_per_frame=4).double()


def test_a_frame_attends_only_to_its_own_audio(adapter: AudioAdapter) -> None:
    tokens = torch.randn(1, 4, 3, WIDTH).double()  # 4 tokens in each of 3 frames
    audio = torch.randn(1, 3, 16, WIDTH).double()
    other = audio.clone()
    other[:, 1] = torch.randn(1, 16, WIDTH)  # the sound of frame 1 only

    changed = (adapter(tokens, other[:, None]) != adapter(tokens, audio[:, None])).any(dim=-1)

    assert changed.any(dim=1).tolist() == [[False, True, False]]


def test_the_attention_has_one_head_of_the_full_width(adapter: AudioAdapter) -> None:
    tokens = torch.randn(2, 5, 3, WIDTH).double()
    audio = torch.randn(2, 3, 16, WIDTH).double()

    for frame in range(3):
        query = adapter.to_q(adapter.norm2(tokens[:, :, frame]))  # (2, 5, 16)
        key, value = adapter.to_kv(adapter.norm1(audio[:, frame])).chunk(2, dim=-1)
        weights = (query @ key.transpose(1, 2) / 16**0.5).softmax(dim=-1)
        audio_delta = adapter.to_out(weights @ value)
        torch.testing.assert_close(adapter(tokens, audio[:, None])[:, :, frame], audio_delta)


def test_a_latent_frame_gets_the_tokens_of_its_four_video_frames(
    projection: AudioProjection,
) -> None:
    windows = torch.randn(1, 9, 10, 5, 4).double()  # video frames of 3 latent frames

    tokens = projection(windows)

    assert tokens.shape == (1, 3, 16, WIDTH)
    by_video_frame = tokens.unflatten(2, (4, 4))  # 4 tokens of each of 4 video frames
    sources = {0: (0, 0, 0, 0), 1: (1, 2, 3, 4), 2: (5, 6, 7, 8)}
    for latent_frame, video_frames in sources.items():
        for place, video_frame in enumerate(video_frames):
            alone = projection(windows[:, [video_frame]])[0, 0, :4]  # 4 tokens, four times over
            torch.testing.assert_close(by_video_frame[0, latent_frame, place], alone)


def test_silence_has_tokens_too(projection: AudioProjection) -> None:
    tokens = projection(torch.zeros(1, 5, 10, 5, 4).double())

    assert tokens.norm() > 1


def test_the_voices_are_added_up_by_their_shares(adapter: AudioAdapter) -> None:
    tokens = torch.randn(2, 5, 3, WIDTH).double()
    audio = torch.randn(2, 3, 3, 16, WIDTH).double()  # of 3 voices
    shares = torch.rand(2, 5, 3, 3).double()

    alone = torch.stack([adapter(tokens, audio[:, [voice]]) for voice in range(3)], dim=-1)

    expected = (alone * shares[..., None, :]).sum(dim=-1)
    torch.testing.assert_close(adapter(tokens, audio, shares), expected)


def test_a_token_that_is_one_voice_s_alone_hears_it_to_the_bit(adapter: AudioAdapter) -> None:
    tokens = torch.randn(1, 5, 3, WIDTH).double()
    audio = torch.randn(1, 2, 3, 16, WIDTH).double()
    shares = torch.zeros(1, 5, 3, 2).double()
    shares[:, :2, :, 0] = 1
    shares[:, 2:, :, 1] = 1

    both = adapter(tokens, audio, shares)

    assert torch.equal(both[:, :2], adapter(tokens, audio[:, :1])[:, :2])
    assert torch.equal(both[:, 2:], adapter(tokens, audio[:, 1:])[:, 2:])


def test_one_voice_alone_is_the_published_formula_to_the_bit(adapter: AudioAdapter) -> None:
    tokens = torch.randn(2, 5, 3, WIDTH).double()
    audio = torch.randn(2, 3, 16, WIDTH).double()
    query = adapter.to_q(adapter.norm2(tokens)).transpose(1, 2)
    key, value = adapter.to_kv(adapter.norm1(audio)).chunk(2, dim=-1)
    expected = adapter.to_out(scaled_dot_product_attention(query, key, value).transpose(1, 2))
    assert torch.equal(adapter(tokens, audio[:, None]), expected)
