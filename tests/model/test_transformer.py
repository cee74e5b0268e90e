import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

from tests.support.golden_transformer import arguments, make_transformer, relative_difference
from tests.support.golden_weights import load_case
from worker.model.linear import Float8Linear
from worker.model.transformer import CachedTokens, HunyuanVideoAvatarTransformer3DModel

TOLERANCE = 1e-6
CASES = ("pad", "nopad", "b1", "llava_mask", "frames33", "t_edges", "face_ones")
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 4,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 12,
    "rope_axes_dim": (4, 6, 6),
    "audio_window_shape": (10, 5, 8),
    "audio_intermediate_dim": 16,
    "audio_attention_dim": 16,
}


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tiny_transformer(**changes: Any) -> HunyuanVideoAvatarTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoAvatarTransformer3DModel(**TINY | changes).eval()


def tiny_inputs(
    *text_lengths: int, num_frames: int = 3, text_positions: int = 8, seed: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(text_lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "hidden_states": normal(4, num_frames, 4, 8),
        "timestep": torch.full((batch,), 937.5),
        "encoder_hidden_states": normal(text_positions, 24),
        "encoder_attention_mask": torch.stack(
            [(torch.arange(text_positions) < length).long() for length in text_lengths]
        ),
        "pooled_projections": normal(12),
        "reference_latents": normal(4, num_frames, 4, 8),
        "audio_embeds": normal(4 * num_frames - 3, 10, 5, 8),
        "face_mask": normal(1, 1, 4, 8).sigmoid(),
        "motion_expression": torch.full((batch, 4), 30.0),
        "motion_pose": torch.full((batch, 4), 25.0),
        "fps": torch.full((batch,), 25.0),
    }


# Against the reference


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Any:
    described, tensors = load_case("transformer")
    model = make_transformer(described, tmp_path_factory.mktemp("transformer"))
    rows = model.get_parameter("audio_proj.proj1.weight").detach()

    def inputs(case: str, key: str = "inputs") -> dict[str, Tensor | None]:
        names = described["cases"][case][key]
        return arguments(names, tensors, described["audio_scale"], rows)

    return described["cases"], tensors, model, inputs


@pytest.mark.parametrize("case", CASES)
def test_the_velocity_is_the_references(golden: Any, case: str) -> None:
    cases, tensors, model, inputs = golden

    velocity = model(**inputs(case)).sample

    assert relative_difference(velocity, tensors[cases[case]["output"]]) < TOLERANCE


@pytest.mark.parametrize("case", ["pad", "b1", "llava_mask", "frames33"])
def test_the_cached_tokens_are_the_references(golden: Any, case: str) -> None:
    cases, tensors, model, inputs = golden
    reference = tensors[cases[case]["tail"]]

    cached_tokens = model(**inputs(case), return_cached_tokens=True).cached_tokens

    image = torch.stack(cached_tokens.image).flatten(1, 2)  # [reference frame; frames]
    num_tokens = image.shape[1]
    assert relative_difference(image, reference[:, :num_tokens]) < TOLERANCE
    lengths = inputs(case)["encoder_attention_mask"].sum(dim=1).tolist()
    assert [len(text) for text in cached_tokens.text] == lengths
    for text, row in zip(cached_tokens.text, reference[:, num_tokens:], strict=True):
        assert relative_difference(text, row[: len(text)]) < TOLERANCE


def test_a_cached_step_is_the_references(golden: Any) -> None:
    cases, tensors, model, inputs = golden
    cached_tokens = model(
        **inputs("is_cache", "first_inputs"), return_cached_tokens=True
    ).cached_tokens

    velocity = model(**inputs("is_cache"), cached_tokens=cached_tokens).sample

    assert relative_difference(velocity, tensors[cases["is_cache"]["output"]]) < TOLERANCE


def test_the_rotary_tables_are_the_references_bit_for_bit(golden: Any) -> None:
    cases, tensors, model, _ = golden
    num_frames, height, width = 5, 4, 6

    tables = model.rope(num_frames, height, width, torch.device("cpu"))

    for table, key in zip(tables, ("freqs_cos", "freqs_sin"), strict=True):
        frame_major = table.unflatten(0, (height * width, 1 + num_frames)).transpose(0, 1)
        assert torch.equal(frame_major.flatten(0, 1), tensors[cases["pad"][key]])


@pytest.mark.large
def test_the_velocity_is_the_references_at_the_published_widths(tmp_path: Path) -> None:
    described, tensors = load_case("transformer_real_width")
    model = make_transformer(described, tmp_path)
    case = described["cases"]["real"]

    velocity = model(**arguments(case["inputs"], tensors, described["audio_scale"])).sample

    assert relative_difference(velocity, tensors[case["output"]]) < TOLERANCE


def test_bfloat16_stays_near_float32(golden: Any) -> None:
    _, _, model, inputs = golden
    half = copy.deepcopy(model).to(torch.bfloat16)

    difference = relative_difference(half(**inputs("pad")).sample, model(**inputs("pad")).sample)

    assert 0 < difference < 2e-2


# Shape of the calls


def test_samples_with_texts_of_unequal_length_do_not_touch_one_another() -> None:
    model, inputs = tiny_transformer(), tiny_inputs(3, 7)

    together = model(**inputs).sample

    for i in range(2):
        alone = model(**{name: value[i : i + 1] for name, value in inputs.items()}).sample
        assert relative_difference(together[i : i + 1], alone) < TOLERANCE


def test_recordings_of_one_sample_are_those_of_a_sample_each() -> None:
    model, both = tiny_transformer(), tiny_inputs(5, 5)
    both = {name: value[:1].expand_as(value) for name, value in both.items()} | {
        "audio_embeds": both["audio_embeds"]
    }
    apart = model(**both, return_cached_tokens=True)
    once = {name: value[:1] for name, value in both.items()} | {
        "audio_embeds": both["audio_embeds"]
    }
    ran = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda *_: ran.append(1))

    together = model(**once, return_cached_tokens=True)

    assert len(ran) == 1 + 1 + 2 + 2  # until the first adapter they are one
    assert relative_difference(*together.sample) > 1e-3
    assert relative_difference(together.sample, apart.sample) < TOLERANCE
    cached = model(**once, cached_tokens=together.cached_tokens).sample
    assert (
        relative_difference(cached, model(**both, cached_tokens=apart.cached_tokens).sample)
        < TOLERANCE
    )


@pytest.mark.parametrize(("text_lengths", "passes"), [((5, 5, 5), 1), ((5, 5, 3), 3)])
@torch.inference_mode(False)
def test_where_a_gradient_is_wanted_samples_of_one_size_go_through_the_blocks_together(
    text_lengths: tuple[int, int, int], passes: int
) -> None:
    model, inputs = tiny_transformer(), tiny_inputs(*text_lengths)
    passed = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_hook(lambda *_: passed.append(1))

    def descend(**inputs: Any) -> tuple[Any, Any, Tensor]:
        model.zero_grad()
        first = model(**inputs, return_cached_tokens=True)
        cached = model(**inputs, cached_tokens=first.cached_tokens).sample
        (first.sample.square().sum() + cached.square().sum()).backward()
        gradient = torch.cat([value.grad.flatten() for value in model.parameters()])
        return first.sample.detach(), cached.detach(), gradient

    together = descend(**inputs)
    assert len(passed) == 8 * passes  # the last block twice
    alone = [
        descend(**{name: value[i : i + 1] for name, value in inputs.items()})
        for i in range(len(text_lengths))
    ]

    with torch.no_grad():
        assert relative_difference(together[0], model(**inputs).sample) < TOLERANCE
    for index in (0, 1):
        expected = torch.cat([each[index] for each in alone])
        assert relative_difference(together[index], expected) < TOLERANCE
    gradient = torch.stack([each[2] for each in alone]).sum(0)
    assert relative_difference(together[2], gradient) < TOLERANCE


def test_text_beyond_the_valid_length_changes_nothing() -> None:
    model, inputs = tiny_transformer(), tiny_inputs(5)
    other = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][:, 5:] += 1.0

    assert torch.equal(model(**inputs).sample, model(**other).sample)


def test_cached_tokens_may_be_frames_of_several_calls() -> None:
    model, inputs, later = tiny_transformer(), tiny_inputs(5), tiny_inputs(5, seed=2)
    first = model(**inputs, return_cached_tokens=True).cached_tokens
    second = model(**later, return_cached_tokens=True).cached_tokens
    frames = (first.image[0][:2], second.image[0][2:])  # reference frame and frame 0; the others

    mixed = model(**later, cached_tokens=CachedTokens((torch.cat(frames),), second.text)).sample

    plain = model(**later).sample
    assert torch.isfinite(mixed).all()
    assert not torch.allclose(mixed, plain)
    whole = model(
        **later, cached_tokens=CachedTokens((second.image[0].clone(),), second.text)
    ).sample
    assert relative_difference(whole, plain) < TOLERANCE


def test_interleaved_calls_with_cached_tokens_are_those_of_each_alone() -> None:
    model, ours, theirs = tiny_transformer(), tiny_inputs(5), tiny_inputs(3, seed=2)
    later = {name: value + 1 for name, value in ours.items() if name == "timestep"}
    alone = model(
        **ours | later, cached_tokens=model(**ours, return_cached_tokens=True).cached_tokens
    ).sample

    our_tokens = model(**ours, return_cached_tokens=True).cached_tokens
    their_tokens = model(**theirs, return_cached_tokens=True).cached_tokens
    model(**theirs, cached_tokens=their_tokens)
    interleaved = model(**ours | later, cached_tokens=our_tokens).sample

    assert torch.equal(interleaved, alone)


def test_with_cached_tokens_only_the_last_block_runs() -> None:
    model, inputs = tiny_transformer(), tiny_inputs(5)
    cached_tokens = model(**inputs, return_cached_tokens=True).cached_tokens
    text_and_reference = ("encoder_hidden_states", "encoder_attention_mask", "reference_latents")
    unread: dict[str, Any] = dict.fromkeys((*text_and_reference, "audio_embeds", "face_mask"))
    ran = []
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    for number, block in enumerate((model.context_embedder, model.audio_proj, *blocks)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))

    model(**inputs | unread, cached_tokens=cached_tokens)

    assert ran == [len(blocks) + 1]


def test_a_tuple_is_returned_on_request() -> None:
    model, inputs = tiny_transformer(), tiny_inputs(5)

    (sample,) = model(**inputs, return_dict=False)
    sample_too, cached_tokens = model(**inputs, return_dict=False, return_cached_tokens=True)

    assert torch.equal(sample, sample_too)
    assert isinstance(cached_tokens, CachedTokens)


def test_a_missing_input_is_refused() -> None:
    with pytest.raises(ValueError, match="only a call with cached_tokens"):
        tiny_transformer()(**tiny_inputs(5) | {"audio_embeds": None})


def test_a_rounded_timestep_is_refused() -> None:
    inputs = tiny_inputs(5)
    inputs["timestep"] = inputs["timestep"].bfloat16()

    with pytest.raises(ValueError, match="timestep must be float32"):
        tiny_transformer()(**inputs)


def test_a_face_mask_for_each_frame_is_that_frames() -> None:
    model, inputs = tiny_transformer(), tiny_inputs(5)
    same = inputs["face_mask"].expand(-1, -1, 3, -1, -1)
    other = same.clone()
    other[:, :, 1] = 0

    assert torch.equal(model(**inputs | {"face_mask": same}).sample, model(**inputs).sample)
    changed = model(**inputs | {"face_mask": other}, return_cached_tokens=True).cached_tokens
    assert not torch.equal(
        changed.image[0], model(**inputs, return_cached_tokens=True).cached_tokens.image[0]
    )


# What diffusers does with the model


@pytest.mark.parametrize("float8_blocks", [False, True])
def test_saving_and_loading_keeps_every_bit(tmp_path: Path, float8_blocks: bool) -> None:
    model = tiny_transformer(float8_blocks=float8_blocks)
    for module in model.modules():
        if isinstance(module, Float8Linear):
            module.weight.copy_(torch.randint_like(module.weight, 0, 100))  # no bits of a NaN

    model.save_pretrained(tmp_path, max_shard_size="200KB")
    loaded = HunyuanVideoAvatarTransformer3DModel.from_pretrained(tmp_path)

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    state_dict = loaded.state_dict()
    assert state_dict.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state_dict[name], value), name
    inputs = tiny_inputs(5)  # how the weights lie in memory decides the last bits of products
    assert relative_difference(loaded(**inputs).sample, model(**inputs).sample) < TOLERANCE


def test_a_skipped_step_of_a_cache_does_not_add_the_audio_twice() -> None:
    model, inputs = tiny_transformer(), tiny_inputs(5)
    plain = model(**inputs).sample
    ran = []
    model.get_submodule("transformer_blocks.1.audio_adapter").register_forward_hook(
        lambda *_: ran.append(1)
    )
    model.enable_cache(FirstBlockCacheConfig(threshold=0.05))

    with model.cache_context("cond"):
        computed = model(**inputs).sample
        skipped = model(**inputs).sample

    assert len(ran) == 1
    assert torch.equal(computed, plain)
    assert relative_difference(skipped, plain) < TOLERANCE


def test_what_a_cache_would_mix_up_is_refused() -> None:
    model = tiny_transformer()
    model.enable_cache(FirstBlockCacheConfig())

    with model.cache_context("cond"):
        for call in (tiny_inputs(3, 5), tiny_inputs(5) | {"return_cached_tokens": True}):
            with pytest.raises(ValueError, match="cache"):
                model(**call)


def test_the_attention_backend_can_be_chosen() -> None:
    model, inputs = tiny_transformer(), tiny_inputs(5)
    plain = model(**inputs).sample

    model.set_attention_backend("_native_math")

    backends = {
        processor._attention_backend
        for processor in model.attn_processors.values()
        if hasattr(processor, "_attention_backend")
    }
    assert backends == {"_native_math"}
    assert relative_difference(model(**inputs).sample, plain) < TOLERANCE
