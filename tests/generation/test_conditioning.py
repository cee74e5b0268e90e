import torch
from PIL import Image

from worker.generation.conditioning import KEPT_PROMPTS, PromptCache

PORTRAIT = Image.new("RGB", (4, 4))


def test_the_oldest_prompts_are_forgotten_first() -> None:
    encoded: list[str] = []
    cache = PromptCache()

    def get(prompt: str) -> None:
        def encode() -> dict[str, torch.Tensor]:
            encoded.append(prompt)
            return {"embeds": torch.zeros(1)}

        cache.get([prompt], PORTRAIT, encode)

    prompts = [f"prompt {index}" for index in range(KEPT_PROMPTS + 1)]
    for prompt in prompts:
        get(prompt)
    get(prompts[-1])
    get(prompts[1])
    assert encoded == prompts  # both were kept
    get(prompts[0])
    assert encoded == [*prompts, prompts[0]]


def test_pictures_of_the_same_bytes_and_another_shape_are_told_apart() -> None:
    cache = PromptCache()
    wide, tall = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))

    first = cache.get(["a"], wide, lambda: {"embeds": torch.zeros(1)})
    other = cache.get(["a"], tall, lambda: {"embeds": torch.ones(1)})

    assert first["embeds"] != other["embeds"]
