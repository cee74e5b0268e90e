from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer, LlavaModel, PreTrainedTokenizerFast

from builder.convert import convert
from tests.support.golden_transformer import relative_difference
from tests.support.golden_weights import build_toy_checkpoint, load_case
from worker.generation.text import (
    IMAGE_SUFFIX,
    NEGATIVE_PROMPT,
    PROMPT_PREFIX,
    encode_clip,
    encode_llava,
    plain_text,
    tokenize,
)
from worker.model.encoders import Float8LlavaModel

TOLERANCE = 1e-6
FLOAT8_TOLERANCE = 7e-2  # of LLaVA's states, in relative norm; 6e-2 was found
DESCRIBED, TENSORS = load_case("text")
CASES = DESCRIBED["cases"]
COMPLETE = [name for name in CASES if "hidden" in CASES[name]]


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def tokenizer(toy_model: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(toy_model / "tokenizer")


@pytest.fixture(scope="module")
def clip_tokenizer(toy_model: Path) -> Any:
    return CLIPTokenizer.from_pretrained(toy_model / "tokenizer_2")


@pytest.fixture(scope="module")
def text_encoder(toy_model: Path) -> Any:
    return LlavaModel.from_pretrained(toy_model / "text_encoder", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text_encoder_in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("in 8 bits")
    convert(build_toy_checkpoint(directory), directory / "model", "fp8")
    encoder = directory / "model" / "text_encoder"
    return Float8LlavaModel.from_pretrained(encoder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text_encoder_2(toy_model: Path) -> Any:
    return CLIPTextModel.from_pretrained(toy_model / "text_encoder_2", dtype=torch.float32).eval()


def test_the_fixed_words_are_the_reference_s() -> None:
    assert DESCRIBED["prompt_prefix"] == PROMPT_PREFIX
    assert CASES["neg"]["prompt"] == NEGATIVE_PROMPT


@pytest.mark.parametrize("name", COMPLETE)
def test_token_ids_are_the_reference_s(name: str, tokenizer: Any) -> None:
    tokens = tokenize(CASES[name]["prompt"], tokenizer)
    valid = CASES[name]["valid_tokens"]
    assert tokens.ids == TENSORS[CASES[name]["token_ids"]][0, :valid].tolist()
    assert tokens.crop_start == DESCRIBED["crop_start"]
    assert tokens.max_length == DESCRIBED["max_length"]
    assert not tokens.was_cut


@pytest.mark.parametrize("name", COMPLETE)
def test_llava_s_states_and_mask_are_the_reference_s_at_every_position(
    name: str, tokenizer: Any, text_encoder: Any
) -> None:
    tokens = tokenize(CASES[name]["prompt"], tokenizer)
    embeds, mask = encode_llava([tokens], TENSORS["pixel_values"], text_encoder)
    assert torch.equal(mask, TENSORS[CASES[name]["dit_mask"]].long())
    assert relative_difference(embeds, TENSORS[CASES[name]["hidden"]]) < TOLERANCE


@pytest.mark.parametrize("name", COMPLETE)
def test_llava_s_states_in_8_bits_are_the_reference_s_within_the_bound(
    name: str, tokenizer: Any, text_encoder_in_8_bits: Any
) -> None:
    tokens = tokenize(CASES[name]["prompt"], tokenizer)
    embeds, mask = encode_llava([tokens], TENSORS["pixel_values"], text_encoder_in_8_bits)
    assert torch.equal(mask, TENSORS[CASES[name]["dit_mask"]].long())
    assert relative_difference(embeds, TENSORS[CASES[name]["hidden"]]) < FLOAT8_TOLERANCE


def test_prompts_do_not_touch_one_another(tokenizer: Any, text_encoder: Any) -> None:
    tokens = [tokenize(CASES[name]["prompt"], tokenizer) for name in ("neg", "limit350")]
    embeds, masks = encode_llava(tokens, TENSORS["pixel_values"], text_encoder)
    for row, name in enumerate(("neg", "limit350")):
        assert relative_difference(embeds[row], TENSORS[CASES[name]["hidden"]][0]) < TOLERANCE
        assert torch.equal(masks[row], TENSORS[CASES[name]["dit_mask"]][0].long())


@pytest.mark.parametrize("name", COMPLETE)
def test_clip_s_pooled_vector_is_the_reference_s(
    name: str, clip_tokenizer: Any, text_encoder_2: Any
) -> None:
    pooled = encode_clip([CASES[name]["prompt"]], clip_tokenizer, text_encoder_2)
    assert relative_difference(pooled, TENSORS[CASES[name]["clip_pooled"]]) < TOLERANCE


def test_a_prompt_that_is_too_long_is_cut_before_the_image(
    tokenizer: Any, text_encoder: Any
) -> None:
    prompt = CASES["too_long"]["prompt"]
    tokens = tokenize(prompt, tokenizer)
    assert tokens.was_cut
    assert len(tokens.ids) == tokens.max_length
    text = tokenizer.decode(tokens.ids)
    assert text.endswith("<|eot_id|>" + IMAGE_SUFFIX)
    spoken = text.split("<|end_header_id|>\n\n")[-1].removesuffix("<|eot_id|>" + IMAGE_SUFFIX)
    assert prompt.startswith(spoken)
    assert len(spoken) > 800
    embeds, _ = encode_llava([tokens], TENSORS["pixel_values"], text_encoder)
    assert embeds.isfinite().all()


@pytest.mark.parametrize(
    "typed", ["<image>", "<|eot_id|>", "<pad>", "<IMAGE>", "<image<image>>", "<<image>"]
)
def test_special_tokens_typed_by_the_user_are_words(typed: str, tokenizer: Any) -> None:
    special = set(tokenizer.get_added_vocab().values())
    plain = [id for id in tokenize("a  in a park", tokenizer).ids if id in special]
    typed_ids = tokenize(f"a {typed} in a park", tokenizer).ids
    assert [id for id in typed_ids if id in special] == plain


def test_a_typed_end_of_text_does_not_end_clip_s_prompt(
    clip_tokenizer: Any, text_encoder_2: Any
) -> None:
    pooled = encode_clip(
        ["a <|endoftext|> cat", "a <|endoftext|> dog"], clip_tokenizer, text_encoder_2
    )
    assert not torch.allclose(pooled[0], pooled[1])


def test_a_prompt_without_special_tokens_stays_as_it_is(tokenizer: Any) -> None:
    prompt = 'A "quoted" <b>bold</b> prompt, 100 % | café\n'
    assert plain_text(prompt, tokenizer) == prompt
