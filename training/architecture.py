"""The parts of the trained demo model: the published architecture at toy width."""

import torch
from diffusers import AutoencoderKLHunyuanVideo
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    PreTrainedTokenizerFast,
)

from worker.generation.text import PROMPT_TEMPLATE
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

LATENT_CHANNELS = 16
AUDIO_STATES = (10, 5, 64)  # a window of the audio encoder's states
TEXT_DIM = 32
POOLED_DIM = 16

# Llama 3's way of cutting text into words, so that the prompt's template has as many tokens.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
]


def transformer() -> HunyuanVideoAvatarTransformer3DModel:
    """The denoiser."""
    return HunyuanVideoAvatarTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=0,
        mlp_ratio=2.0,  # wide and shallow: a token has to carry 64 values and 64 of the portrait's
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(16, 24, 24),
        audio_window_shape=AUDIO_STATES,
        audio_intermediate_dim=96,
        audio_attention_dim=128,
    )


def autoencoder() -> AutoencoderKLHunyuanVideo:
    """The autoencoder: 8 x 8 pixels x 4 frames to a latent."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 32, 48),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,  # over all tokens of a tile: slow, and nothing here is far
    )


def text_encoders() -> tuple[LlavaModel, CLIPTextModel]:
    """The two text encoders, with random weights that are always the same: no prompt matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20250526)
        return text_encoder(prompt_tokenizer()).eval(), pooled_text_encoder().eval()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> LlavaModel:
    """Reads the prompt and the portrait, which is 16 tokens to it."""
    return LlavaModel(
        LlavaConfig(
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_DIM,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
            ),
            vision_config=CLIPVisionConfig(
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=336,
                patch_size=84,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def prompt_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the template's words and spells out the rest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT_TEMPLATE], trainer)
    begin, end, *_, pad = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad
    )


def pooled_text_encoder() -> CLIPTextModel:
    """Reads the prompt alone."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=POOLED_DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=512,
            eos_token_id=513,
        )
    )


def pooled_tokenizer() -> CLIPTokenizer:
    """Knows letters only."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
