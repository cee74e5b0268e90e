"""Uses the libraries as the worker does, without importing any of the worker.

A child of the tests runs it with the guard (`import worker` first) or, as the control, without.
"""

import json
import sys


def use() -> None:
    """Runs tiny models and both kinds of image processor input; raises if something is broken."""
    import torch
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        DiffusionPipeline,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoTransformer3DModel,
    )
    from PIL import Image
    from transformers import (
        AutoFeatureExtractor,
        AutoProcessor,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        WhisperModel,
    )

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    text_model = CLIPTextModel(CLIPTextConfig(vocab_size=8, bos_token_id=1, eos_token_id=7, **tiny))
    text_model(input_ids=torch.tensor([[1, 2, 7]]))

    vision = CLIPVisionConfig(image_size=16, patch_size=8, **tiny)
    language = LlamaConfig(vocab_size=16, **tiny)
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=15)
    llava = LlavaForConditionalGeneration(config)
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    portrait = Image.new("RGB", (24, 32), (200, 100, 50))
    for image in (portrait, torch.zeros(3, 32, 24, dtype=torch.uint8)):
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        assert type(pixel_values) is torch.Tensor
        llava(input_ids=torch.tensor([[1, 15, 15, 15, 15, 2]]), pixel_values=pixel_values)

    for each in (
        AutoencoderKLHunyuanVideo,
        HunyuanVideoTransformer3DModel,
        DiffusionPipeline,
        FlowMatchEulerDiscreteScheduler,
        AutoFeatureExtractor,
        AutoProcessor,
        AutoTokenizer,
        WhisperModel,
    ):
        assert isinstance(each, type)


def facts() -> dict[str, object]:
    """What the libraries took torchvision for, and what a program that asks for it gets."""
    from transformers import CLIPImageProcessor
    from transformers.utils import is_torchvision_available

    try:
        import torchvision
        from torchvision.utils import make_grid

        asked_for = type(torchvision).__name__
        asked_for += f" with a {type(make_grid(sys.modules['torch'].zeros(2, 3, 4, 4))).__name__}"
    except Exception as error:
        asked_for = f"{type(error).__name__}: {error}"
    return {
        "processor": CLIPImageProcessor.__name__,
        "bases": [base.__name__ for base in CLIPImageProcessor.__mro__],
        "available": is_torchvision_available(),
        "torchvision": asked_for,
    }


def print_facts() -> None:
    """Uses everything, then prints the facts, and the guard's report if the guard is here."""
    use()
    found = facts()
    if "worker" in sys.modules:
        from worker import import_guard

        found["report"] = import_guard.report().as_dict()
    sys.stdout.write(json.dumps(found) + "\n")
