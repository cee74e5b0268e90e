"""Prompts into embeddings: LLaVA reads them beside the portrait, CLIP makes one pooled vector.

LLaVA's sequence has one length whatever the prompt. With v valid tokens, the image's last:

    0        95               v - 1          v + 575  926
    | system | prompt, suffix | image tokens | pads   |

Positions before `crop_start` (95) are dropped, which leaves 831. Pads are embedded as zeros, and
what the decoder makes of them matters, because the mask that the transformer gets marks them.

Source: Tencent-Hunyuan/HunyuanVideo-Avatar@fd59436 run on transformers 4.45.1, measured.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    LlavaModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PROMPT_PREFIX = "Authentic, Realistic, Natural, High-quality, Lens-Fixed, "
NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, "
    "bad hands, bad teeth, bad eyes, bad limbs, distortion, blurring, Lens changes"
)
PROMPT_TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]  # the reference's, letter for letter
IMAGE_SUFFIX = "\nThe person looks like<image>"
MAX_PROMPT_TOKENS = 256  # of prompt and suffix, after the template's system part
CLIP_TOKENS = 77


class PromptTokens(NamedTuple):
    """One prompt in LLaVA's vocabulary; the last token is the place of the image."""

    ids: list[int]
    crop_start: int  # tokens of the template before the prompt
    was_cut: bool

    @property
    def max_length(self) -> int:
        """Text positions of the layout, pads included."""
        return self.crop_start + MAX_PROMPT_TOKENS


def plain_text(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt with a space in each of the tokenizer's special tokens, which makes it words.

    Differs from upstream: there a typed `<image>` asks for a second picture, and fails.
    """
    special = "|".join(re.escape(token) for token in tokenizer.get_added_vocab())
    if not special:
        return prompt
    return re.sub(special, lambda match: f"{match[0][0]} {match[0][1:]}", prompt, flags=re.I)


def tokenize(prompt: str, tokenizer: PreTrainedTokenizerFast) -> PromptTokens:
    """The prompt in its template, the image last; a prompt that is too long loses its end.

    Differs from upstream: it cuts the image off too, and fails.
    """
    before, after = PROMPT_TEMPLATE.split("{}")
    crop_start = len(tokenizer(before).input_ids)
    end = tokenizer(after + IMAGE_SUFFIX, add_special_tokens=False).input_ids
    text = before + plain_text(prompt, tokenizer) + after + IMAGE_SUFFIX
    ids = tokenizer(text).input_ids
    max_length = crop_start + MAX_PROMPT_TOKENS
    was_cut = len(ids) > max_length
    if was_cut:
        ids = ids[: max_length - len(end)] + end
    return PromptTokens(ids, crop_start, was_cut)


def encode_llava(
    prompts: Sequence[PromptTokens],
    pixel_values: Tensor,  # (1, 3, 336, 336)
    text_encoder: LlavaModel,
) -> tuple[Tensor, Tensor]:  # (B, 831, D), (B, 831)
    """Embeddings of the prompts, all beside the same picture, and the masks that go with them.

    The masks are on the CPU, where the transformer can count their ones without waiting.
    """
    features = text_encoder.get_image_features(
        pixel_values.to(text_encoder.device, text_encoder.dtype)
    )
    image_embeds = features.pooler_output[0]  # (576, D)
    embed_tokens = text_encoder.get_input_embeddings()
    length = prompts[0].max_length - 1 + len(image_embeds)
    inputs_embeds = image_embeds.new_zeros(len(prompts), length, image_embeds.shape[-1])
    lengths = []
    for row, prompt in zip(inputs_embeds, prompts, strict=True):
        words = embed_tokens(torch.tensor(prompt.ids[:-1], device=row.device))
        valid = torch.cat([words, image_embeds])
        row[: len(valid)] = valid
        lengths.append(len(valid))

    valid_positions = torch.arange(length) < torch.tensor(lengths)[:, None]  # (B, length)
    hidden_states = _last_hidden_states(text_encoder, inputs_embeds, valid_positions)
    masks = torch.stack([_transformer_mask(prompt, length) for prompt in prompts])
    crop_start = prompts[0].crop_start
    return hidden_states[:, crop_start:], masks[:, crop_start:]


def _last_hidden_states(
    text_encoder: LlavaModel,
    inputs_embeds: Tensor,  # (B, length, D)
    valid_positions: Tensor,  # (B, length) bool
) -> Tensor:  # (B, length, D)
    """What the last decoder layer gives, before the final norm: the norm's input."""
    decoder = text_encoder.language_model
    mask = valid_positions.long().to(inputs_embeds.device)
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    states: list[Tensor] = []
    hook = decoder.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    try:
        decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,
        )
    finally:
        hook.remove()
    return states[0]


def _transformer_mask(prompt: PromptTokens, length: int) -> Tensor:  # (length,)
    """The reference's mask: ones at as many positions as are valid, but not at the same ones.

    It is the mask of the text with its pads, and ones for the image behind them, while the pads
    really stand behind the image. The model was trained so.
    """
    positions = torch.arange(length)
    return ((positions < len(prompt.ids)) | (positions >= prompt.max_length)).long()


def encode_clip(
    prompts: Sequence[str],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
) -> Tensor:  # (B, D_pooled)
    """CLIP's pooled vector of each prompt, of its first 77 tokens."""
    tokens = tokenizer(
        [plain_text(prompt, tokenizer) for prompt in prompts],
        padding="max_length",
        max_length=CLIP_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids.to(text_encoder.device)).pooler_output
