"""Times forward passes of the full-size transformer with random weights, and checks its bfloat16.

    python -m benchmarks.full_size_forward
    python -m benchmarks.full_size_forward --device cpu --backends native --num-layers 2 \
        --num-single-layers 2 --num-attention-heads 2 --num-frames 2 --height 8 --width 8

Prints one JSON object a measurement: seconds and peak memory of a forward at each batch size and
with each attention backend, in full and from a tail; then, for few tokens, how far bfloat16 is
from float32 and whether the forward ever waits for the GPU.
"""

import argparse
import json
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel, Tail

CHECK_GRID = (3, 16, 16)  # latent frames, rows and columns for the comparison of dtypes


def build_transformer(
    device: torch.device, dtype: torch.dtype, **config: int
) -> HunyuanVideoAvatarTransformer3DModel:
    """The model with random weights that keep activations in a trained model's range."""
    with torch.device("meta"):
        model = HunyuanVideoAvatarTransformer3DModel(
            **config, rope_axes_dim=(16, 56, 56), attention_head_dim=128
        )
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            spread = 1 / math.sqrt(parameter[0].numel())
            parameter.data.normal_(std=spread, generator=generator)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval()


def random_inputs(
    model: HunyuanVideoAvatarTransformer3DModel,
    batch: int,
    grid: tuple[int, int, int],
    text_positions: int,
    text_length: int,
) -> dict[str, Tensor]:
    """What one forward takes; the mask stays on the CPU."""
    device, config = model.device, model.config
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, generator=generator)

    def constant(value: float, *shape: int) -> Tensor:
        return torch.full((batch, *shape), value, device=device)

    mask = (torch.arange(text_positions) < text_length).long()
    return {
        "hidden_states": normal(config.in_channels, *grid),
        "timestep": constant(937.5),
        "encoder_hidden_states": normal(text_positions, config.text_embed_dim),
        "encoder_attention_mask": mask.expand(batch, -1),
        "pooled_projections": normal(config.pooled_projection_dim),
        "reference_latents": normal(config.in_channels, *grid),
        "audio_embeds": normal(4 * grid[0] - 3, *config.audio_window_shape),
        "face_mask": constant(1.0, 1, 1, *grid[1:]),
        "motion_expression": constant(30.0, 4),
        "motion_pose": constant(25.0, 4),
        "fps": constant(25.0),
    }


def measure(model: HunyuanVideoAvatarTransformer3DModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the second of two equal forwards, and the peak memory of both."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        synchronize(device)
        started = time.perf_counter()
        model(**inputs)
        synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / 1024**3 if device.type == "cuda" else None
    return {"seconds": round(seconds, 3), "peak_gib": peak and round(peak, 2)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waits_for_gpu(model: HunyuanVideoAvatarTransformer3DModel, inputs: dict[str, Tensor]) -> str:
    """What makes the forward wait for the GPU; empty if nothing does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs)
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def relative_difference(value: Tensor, expected: Tensor) -> float:
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm()).item()


def report(**measurement: Any) -> None:
    sys.stdout.write(json.dumps(measurement) + "\n")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backends", nargs="+", default=["native", "_native_cudnn"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--num-frames", type=int, default=33, help="latent frames: 33 are 129")
    parser.add_argument("--height", type=int, default=88, help="latent rows: 88 are 704 pixels")
    parser.add_argument("--width", type=int, default=96, help="latent columns: 96 are 768 pixels")
    parser.add_argument("--text-positions", type=int, default=831)
    parser.add_argument("--text-length", type=int, default=400)
    parser.add_argument("--num-layers", type=int, default=20)
    parser.add_argument("--num-single-layers", type=int, default=40)
    parser.add_argument("--num-attention-heads", type=int, default=24)
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    text = (arguments.text_positions, arguments.text_length)
    grid = (arguments.num_frames, arguments.height, arguments.width)
    model = build_transformer(
        arguments.device,
        torch.bfloat16,
        num_layers=arguments.num_layers,
        num_single_layers=arguments.num_single_layers,
        num_attention_heads=arguments.num_attention_heads,
    )
    gpu = torch.cuda.get_device_name() if arguments.device.type == "cuda" else None
    report(torch=torch.__version__, gpu=gpu, parameters=model.num_parameters(), grid=grid)

    for backend in arguments.backends:
        model.set_attention_backend(backend)
        for batch in arguments.batches:
            inputs = random_inputs(model, batch, grid, *text)
            report(backend=backend, batch=batch, **measure(model, inputs))
    tail: Tail = model(**inputs, return_tail=True).tail
    report(backend=backend, batch=batch, of="tail", **measure(model, inputs | {"tail": tail}))
    del tail, inputs

    model.set_attention_backend("native")
    inputs = random_inputs(model, 1, CHECK_GRID, *text)
    if arguments.device.type == "cuda":
        model(**inputs)
        report(waits_for_gpu=waits_for_gpu(model, inputs))
    half = model.bfloat16()(**inputs).sample
    whole = model.float()(**inputs).sample  # the same weights
    report(of="bfloat16 against float32", relative_difference=relative_difference(half, whole))


if __name__ == "__main__":
    main()
