"""The demo model: the real architecture at toy width, with random weights made from a fixed seed.

It shows that the whole chain works, on two CPU cores and without a download. Its pictures are
coloured noise. `AVATAR_MODEL=demo` selects it and nothing else does.
"""

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
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
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.pipeline import HunyuanVideoAvatarPipeline
from worker.text import PROMPT_TEMPLATE

SEED = 20250526
LATENT_CHANNELS = 4
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


def build_pipeline() -> HunyuanVideoAvatarPipeline:
    """The demo model on the CPU in float32; the same weights on every machine."""
    tokenizer = prompt_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return HunyuanVideoAvatarPipeline(
            transformer=_transformer().eval(),
            vae=_vae().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder=text_encoder(tokenizer).eval(),
            tokenizer=tokenizer,
            text_encoder_2=pooled_text_encoder().eval(),
            tokenizer_2=pooled_tokenizer(),
            audio_encoder=_audio_encoder().eval(),
            feature_extractor=WhisperFeatureExtractor(feature_size=80),
        )


def _transformer() -> HunyuanVideoAvatarTransformer3DModel:
    return HunyuanVideoAvatarTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=1,
        attention_head_dim=32,  # the narrowest for which attention is quick on a CPU
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(8, 12, 12),
        audio_intermediate_dim=16,
        audio_attention_dim=16,
    )


def _vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


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


def _audio_encoder() -> WhisperModel:
    return WhisperModel(
        WhisperConfig(  # the width and depth of whisper-tiny are part of the avatar's interface
            d_model=384,
            encoder_layers=4,
            encoder_attention_heads=6,
            encoder_ffn_dim=32,
            decoder_layers=0,
            decoder_attention_heads=6,
            decoder_ffn_dim=16,
            vocab_size=32,
            num_mel_bins=80,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
