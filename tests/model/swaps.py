"""Tokens that ranks swap for heads and back: whether they come where they should."""

import torch

from worker.model.context_parallel import ContextParallel

FRAMES = 3


def arrive(
    parallel: ContextParallel,
    num_columns: int,
    num_text: int,
    heads: int,
    device: torch.device,
    seed: int = 0,
) -> bool:
    """Whether a pass that all ranks share swaps its tokens to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 1, num_columns * FRAMES, heads, 4, generator=generator).to(device)
    text = torch.randn(3, 1, num_text, heads, 4, generator=generator).to(device)
    whole = torch.cat([image, text], dim=2)  # queries, keys and values
    own_image = parallel.share_columns(image, 2, FRAMES)
    own_text = parallel.share(text, 2)

    shares = parallel.token_shares(num_columns, FRAMES, num_text)
    told = parallel.token_shares_of_cached(num_columns, FRAMES, [own_text.shape[2]] * 2, device)
    # all three on their way together
    swaps = [shares.swap_for_heads(*each) for each in zip(own_image, own_text, strict=True)]
    swapped = torch.stack([swap.wait() for swap in swaps])
    back = [shares.swap_back(each, heads).wait() for each in swapped]
    patches = shares.gather_image(own_image[0].flatten(2))
    return (
        told == [shares, shares]
        and torch.equal(swapped, parallel.share(whole, 3))
        and torch.equal(torch.stack(back), torch.cat([own_image, own_text], dim=2))
        and torch.equal(patches, image[0].flatten(2))
    )
