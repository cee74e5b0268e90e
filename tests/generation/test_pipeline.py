import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from builder.convert import convert, load_official_transformer
from tests.support.golden_transformer import relative_difference
from tests.support.golden_weights import build_toy_checkpoint, load_case
from worker.generation.conditioning import Conditioning
from worker.generation.face import TorchScriptFaceDetector
from worker.generation.options import DenoiseOptions
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.text import PROMPT_PREFIX
from worker.generation.voices import Voice
from worker.generation.watch import Watch
from worker.shapes import Box, VideoPlan

LATENTS_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
# The speech features are rounded to float16 twice on their way, and CPUs differ by 4e-7 before it.
# A feature that falls to the other side moves by 5e-4, and the latents by 4e-6 in all.
END_TO_END_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}

LOOP, LOOP_TENSORS = load_case("loop")
END_TO_END, END_TO_END_TENSORS = load_case("end_to_end")
PROMPTS, _ = load_case("text")
PORTRAIT = Image.fromarray(END_TO_END_TENSORS["image"].numpy())


@pytest.fixture(scope="module")
def pipeline(toy_model: Path) -> HunyuanVideoAvatarPipeline:
    return load(toy_model)


def load(directory: Path) -> HunyuanVideoAvatarPipeline:
    pipeline = HunyuanVideoAvatarPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def speech(seconds: float) -> np.ndarray:
    waveform = END_TO_END_TENSORS["waveform"].numpy().astype(np.float32) / 32768
    return np.tile(waveform, 8)[: round(seconds * 16_000)]


def small(**changes: Any) -> dict[str, Any]:
    """Arguments of a video that takes a second: 32 x 32 px, one window."""
    arguments = {
        "image": PORTRAIT,
        "audio": speech(0.2),
        "prompt": "A person speaks.",
        "face_box": (0, 0, 128, 64),
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "generator": seeded(0),
        "output_type": "latent",
    }
    return arguments | changes


# Against the reference


def loop_conditioning(num_audio_frames: int, scaling_factor: float) -> Conditioning:
    """What the loop alone was given, in the reference's tensors."""

    def pair(name: str) -> Tensor:
        rows = (LOOP["inputs"][side][name] for side in ("neg", "pos"))
        return torch.cat([LOOP_TENSORS[row] for row in rows])

    audio = LOOP_TENSORS["audio"].float() * LOOP["audio_scale"]
    latents = LOOP_TENSORS["ref_latents"]
    return Conditioning(
        prompt_embeds=pair("text_states"),
        prompt_mask=pair("text_mask").long(),
        pooled_prompt_embeds=pair("text_states_2"),
        audio_embeds=audio.repeat(1, 1, 1, 1, 8)[:, :num_audio_frames],
        face_mask=LOOP_TENSORS["face_mask"],
        reference_mean=latents / scaling_factor,
        reference_std=torch.zeros_like(latents),
        motion_pose=LOOP["motion_pose"][0],
        motion_expression=LOOP["motion_exp"][0],
        height=64,
        width=64,
        num_frames=num_audio_frames if num_audio_frames == 129 else num_audio_frames - 5,
        fps=LOOP["fps"],
        face_boxes=(),
        warnings=(),
    )


@pytest.mark.parametrize("state", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOOP["cases"])
def test_the_loop_is_the_reference_s(
    name: str, state: str, pipeline: HunyuanVideoAvatarPipeline
) -> None:
    case = LOOP["cases"][name]
    conditioning = loop_conditioning(case["audio_frames"], pipeline.vae.config.scaling_factor)
    assert conditioning.plan.num_windows == case["windows"]
    latents = pipeline.denoise(
        conditioning,
        DenoiseOptions(
            num_inference_steps=case["steps"],
            guidance_scale=case["cfg"],
            flow_shift=LOOP["shift"],
            computed_steps="reference",
            latents_dtype=torch.float32 if state == "float32" else None,
        ),
        generator=seeded(case["seed"]),
    )
    reference = LOOP_TENSORS[case[f"latents_{state}"]]
    assert relative_difference(latents, reference) < LATENTS_TOLERANCE[state]


def end_to_end_arguments(case: Mapping[str, Any]) -> dict[str, Any]:
    reference_noise = torch.randn(1, 4, 33, 8, 16, generator=seeded(case["reference_seed"]))
    return {
        "image": PORTRAIT,
        "audio": speech(6.0)[: case["samples"]],
        "prompt": PROMPTS["cases"][case["prompt_case"]]["prompt"].removeprefix(PROMPT_PREFIX),
        "face_box": case["bbox"],
        "height": 64,
        "width": 128,
        "num_inference_steps": case["steps"],
        "guidance_scale": case["guidance"],
        "generator": seeded(case["seed"]),
        "reference_noise": reference_noise,
        "computed_steps": "reference",
    }


@pytest.mark.parametrize("state", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "s3_steps20_multi",
        pytest.param("s3_steps50_pos", marks=pytest.mark.slow),
        pytest.param("s6_steps20_pos", marks=pytest.mark.slow),
    ],
)
def test_a_video_is_the_reference_s_from_end_to_end(
    name: str, state: str, pipeline: HunyuanVideoAvatarPipeline
) -> None:
    case = END_TO_END["cases"][name]
    output = pipeline(
        **end_to_end_arguments(case),
        latents_dtype=torch.float32 if state == "float32" else None,
        output_type="latent",
    )
    tolerance = END_TO_END_TOLERANCE[state]
    assert (
        relative_difference(output.frames, END_TO_END_TENSORS[case[f"latents_{state}"]]) < tolerance
    )
    indices = case["frames"] if state == "float32" else case["frames_bfloat16"]
    frames = torch.cat(list(pipeline.decode_frames(output.frames, num_frames=max(indices) + 1)))
    reference = END_TO_END_TENSORS[case[f"samples_{state}"]][0].transpose(0, 1)
    assert relative_difference(frames[indices], reference) < tolerance
    assert output.face_box == (case["bbox"] and tuple(case["bbox"]))
    assert ("no face was found" in " ".join(output.warnings)) == (case["bbox"] is None)


def test_the_published_8_bit_pair_makes_its_own_video_from_end_to_end(
    tmp_path: Path, pipeline: HunyuanVideoAvatarPipeline
) -> None:
    ckpts = build_toy_checkpoint(tmp_path, plain=False, float8=True)
    convert(ckpts, tmp_path / "model")
    arguments = {
        "num_inference_steps": 4,
        "computed_steps": [0, 1, 3],
        "latents_dtype": torch.float32,
    }
    ours = load(tmp_path / "model")(**small(**arguments)).frames
    dequantized = load_official_transformer(ckpts / "hunyuan-video-t2v-720p" / "transformers")
    components = pipeline.components | {"transformer": dequantized}
    expected = HunyuanVideoAvatarPipeline(**components)(**small(**arguments)).frames
    assert relative_difference(ours, expected) < 1e-6
    plain = pipeline(**small(**arguments)).frames
    assert relative_difference(ours, plain) > 1e-4  # the weights are others


# Beyond the reference


@pytest.mark.parametrize(
    ("seconds", "fps", "num_frames"), [(0.2, 25, 5), (1.0, 12.5, 12), (5.3, 25, 132)]
)
def test_a_video_is_as_long_as_its_speech(
    seconds: float, fps: float, num_frames: int, pipeline: HunyuanVideoAvatarPipeline
) -> None:
    arguments = small(audio=speech(seconds), fps=fps, num_inference_steps=1, output_type="pt")
    output = pipeline(**arguments)
    assert output.frames.shape == (1, num_frames, 3, 32, 32)
    assert output.fps == fps


TWO_STEPS = DenoiseOptions(num_inference_steps=2)


def test_forty_seconds_are_generated_to_the_end(pipeline: HunyuanVideoAvatarPipeline) -> None:
    conditioning = pipeline.encode(
        image=PORTRAIT, voices=[Voice(speech(40.0), (0, 0, 128, 64))], prompt="A person.",
        height=32, width=32,
    )  # fmt: skip
    assert conditioning.num_frames == 1000
    assert conditioning.audio_embeds[:, 999].any()
    latents = pipeline.denoise(conditioning, TWO_STEPS, generator=seeded(0))
    assert latents.shape == (1, 4, 252, 4, 4)
    assert latents.isfinite().all()
    silent_end = conditioning.audio_embeds.clone()
    silent_end[:, 900:] = 0
    quiet = replace(conditioning, audio_embeds=silent_end)
    other = pipeline.denoise(quiet, TWO_STEPS, generator=seeded(0))
    assert not torch.equal(latents[:, :, -10:], other[:, :, -10:])


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_any_number_of_steps_runs(num_steps: int, pipeline: HunyuanVideoAvatarPipeline) -> None:
    assert pipeline(**small(num_inference_steps=num_steps)).frames.isfinite().all()


def test_without_guidance_each_step_runs_one_branch(pipeline: HunyuanVideoAvatarPipeline) -> None:
    samples = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _module, _inputs, output: samples.append(len(output.sample))
    )
    pipeline(**small(guidance_scale=1.0, num_inference_steps=3))
    assert samples == [1, 1, 1]
    pipeline(**small(guidance_scale=1.1, num_inference_steps=3))
    hook.remove()
    assert samples[3:] == [2, 2, 2]


def test_cached_steps_are_close_to_computed_ones_and_cheaper(
    pipeline: HunyuanVideoAvatarPipeline,
) -> None:
    blocks = []
    hook = pipeline.transformer.transformer_blocks[0].register_forward_hook(
        lambda *_: blocks.append(1)
    )
    arguments = {"num_inference_steps": 6, "latents_dtype": torch.float32}
    computed = pipeline(**small(**arguments, computed_steps=range(6))).frames
    num_computed = len(blocks)
    cached = pipeline(**small(**arguments, computed_steps=[0, 1, 2, 4])).frames
    hook.remove()
    assert num_computed == 12
    assert len(blocks) - num_computed == 8
    assert 0 < relative_difference(cached, computed) < 0.5


def test_prompts_and_portrait_are_encoded_once(toy_model: Path) -> None:
    pipeline, encoded = load(toy_model), []
    pipeline.text_encoder.language_model.register_forward_hook(lambda *_: encoded.append(1))
    first = pipeline(**small()).frames
    assert torch.equal(pipeline(**small()).frames, first)
    assert len(encoded) == 1
    pipeline(**small(prompt="Someone else speaks."))
    assert len(encoded) == 2
    pipeline(**small(image=Image.new("RGB", (64, 64), "blue")))
    assert len(encoded) == 3


def test_a_prompt_that_is_too_long_is_cut_and_the_user_told(
    pipeline: HunyuanVideoAvatarPipeline,
) -> None:
    output = pipeline(**small(prompt=PROMPTS["cases"]["too_long"]["prompt"]))
    assert output.warnings == ("the prompt is longer than the model reads: its end was cut off",)


def test_a_typed_image_token_is_only_text(pipeline: HunyuanVideoAvatarPipeline) -> None:
    output = pipeline(**small(prompt="A <image> of <|eot_id|> a person"))
    assert output.frames.isfinite().all()
    assert output.warnings == ()


# Arguments


def test_the_arguments_and_their_defaults_are_the_documented_ones() -> None:
    parameters = inspect.signature(HunyuanVideoAvatarPipeline.__call__).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert list(parameters)[1:4] == ["image", "audio", "prompt"]
    assert defaults == {
        "negative_prompt": None,
        "face_box": None,
        "resolution": 704,
        "height": None,
        "width": None,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "flow_shift": 5.0,
        "fps": 25,
        "motion_pose": 25,
        "motion_expression": 30,
        "generator": None,
        "latents": None,
        "reference_noise": None,
        "latents_dtype": None,
        "computed_steps": None,
        "float8": False,
        "output_type": "pt",
        "on_step": None,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"fps": 30},
        {"height": None},
        {"width": 40},
        {"audio": np.zeros((2, 16_000), dtype=np.float32)},
        {"audio": np.zeros(100, dtype=np.float32)},
        {"face_box": (0, 0, 0, 0)},
        {"face_box": (200, 20, 16, 18)},
        {"latents": torch.zeros(1, 4, 33, 4, 4)},
        {"reference_noise": torch.zeros(1, 4, 1, 4, 4)},
        {"computed_steps": [1]},
        {"num_inference_steps": 0},
        {"output_type": "mp4"},
    ],
    ids=lambda changes: f"{next(iter(changes))}",
)
def test_what_the_model_cannot_serve_is_refused_by_name(
    changes: dict[str, Any], pipeline: HunyuanVideoAvatarPipeline
) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        pipeline(**small(**changes))


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_frames_come_as_diffusers_lays_them_out(
    output_type: str, pipeline: HunyuanVideoAvatarPipeline
) -> None:
    frames = pipeline(**small(output_type=output_type, width=48)).frames
    if output_type == "pil":
        assert [len(frames), len(frames[0]), frames[0][0].size] == [1, 5, (48, 32)]
        return
    shape = {"pt": (1, 5, 3, 32, 48), "np": (1, 5, 32, 48, 3)}[output_type]
    assert frames.shape == shape
    assert frames.dtype in (torch.float32, np.float32)
    assert 0 <= frames.min() < frames.max() <= 1


def test_the_size_follows_from_the_picture(pipeline: HunyuanVideoAvatarPipeline) -> None:
    conditioning = pipeline.encode(
        image=Image.new("RGB", (300, 200)),
        voices=[Voice(speech(0.2), None)],
        prompt="",
        resolution=64,
    )
    assert (conditioning.height, conditioning.width) == (64, 128)
    assert conditioning.reference_mean.shape == (1, 4, 1, 8, 16)
    assert conditioning.face_mask.shape == (1, 1, 1, 8, 16)


def test_a_face_box_is_in_the_pixels_of_the_given_picture(
    pipeline: Any,
) -> None:
    def mask(image: Image.Image, box: Box) -> Tensor:
        voices = [Voice(speech(0.2), box)]
        return pipeline.encode(image, voices, prompt="", height=64, width=128).face_mask

    large = PORTRAIT.resize((256, 192))
    assert torch.equal(mask(PORTRAIT, (40, 20, 16, 18)), mask(large, (80, 60, 32, 54)))


def test_a_detected_face_is_told_in_the_pixels_of_the_given_picture(
    pipeline: Any,
) -> None:
    photo = Image.open(Path(__file__).parents[1] / "data" / "astronaut.jpg")
    arguments = {"image": photo, "prompt": "", "height": 256, "width": 256}
    conditioning = pipeline.encode(voices=[Voice(speech(0.2), None)], **arguments)
    [(x, y, width, height)] = conditioning.face_boxes
    assert x < 95 < x + width
    assert y < 65 < y + height
    given = pipeline.encode(voices=[Voice(speech(0.2), conditioning.face_boxes[0])], **arguments)
    assert torch.equal(given.face_mask, conditioning.face_mask)


# Repeating, stopping, saving


def test_a_seed_repeats_the_video_and_the_global_generator_stays_untouched(
    pipeline: HunyuanVideoAvatarPipeline,
) -> None:
    state = torch.get_rng_state()
    first, again = (pipeline(**small(generator=seeded(5))).frames for _ in range(2))
    other = pipeline(**small(generator=seeded(6))).frames
    unseeded = pipeline(**small(generator=None)).frames
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(unseeded, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_videos_in_turns_do_not_disturb_one_another(
    pipeline: HunyuanVideoAvatarPipeline,
) -> None:
    arguments = {"num_inference_steps": 4, "computed_steps": [0, 2]}
    alone = pipeline(**small(**arguments)).frames

    def make_another(step: int, num_steps: int) -> None:
        pipeline(**small(generator=seeded(9), prompt="Another person."))

    assert torch.equal(pipeline(**small(**arguments, on_step=make_another)).frames, alone)


def test_on_step_counts_finished_steps_and_can_stop_the_loop(
    pipeline: HunyuanVideoAvatarPipeline,
) -> None:
    class StopError(Exception):
        pass

    seen = []

    def on_step(step: int, num_steps: int) -> None:
        seen.append((step, num_steps))
        if step == 3:
            raise StopError

    with pytest.raises(StopError):
        pipeline(**small(num_inference_steps=5, on_step=on_step))
    assert seen == [(1, 5), (2, 5), (3, 5)]


def test_the_three_stages_are_the_whole(pipeline: HunyuanVideoAvatarPipeline) -> None:
    arguments = small()
    options = DenoiseOptions(num_inference_steps=arguments.pop("num_inference_steps"))
    generator = arguments.pop("generator")
    del arguments["output_type"]
    arguments["voices"] = [Voice(arguments.pop("audio"), arguments.pop("face_box"))]
    conditioning = pipeline.encode(**arguments)
    assert conditioning.plan == VideoPlan(5)
    latents = pipeline.denoise(conditioning, options, generator)
    frames = list(pipeline.decode_frames(latents, num_frames=conditioning.num_frames))
    whole = pipeline(**small(output_type="pt")).frames
    assert torch.equal(torch.cat(frames)[None], whole)


def test_saving_and_loading_changes_no_bit(
    pipeline: HunyuanVideoAvatarPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            loaded = getattr(again, name).state_dict()
            for key, value in component.state_dict().items():
                assert torch.equal(value, loaded[key]), (name, key)
    video = pipeline(**small(output_type="pt")).frames
    assert torch.equal(again(**small(output_type="pt")).frames, video)


class OneFace(torch.nn.Module):
    """A detector that always finds the face of the portrait, at 832 x 416 px."""

    def __init__(self) -> None:
        super().__init__()
        self.face = torch.nn.Parameter(torch.tensor([312.0, 188.5, 104.0, 117.0, 0.9]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.face, torch.zeros(10), torch.ones(1)])[None, None]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_checkpoint_s_face_detector_is_converted_loaded_and_saved(tmp_path: Path) -> None:
    ckpts = build_toy_checkpoint(tmp_path)
    (ckpts / "det_align").mkdir()
    torch.jit.script(OneFace()).save(str(ckpts / "det_align" / "detface.pt"))
    convert(ckpts, tmp_path / "model")
    pipeline = load(tmp_path / "model")
    pipeline.save_pretrained(tmp_path / "saved")
    for each in (pipeline, load(tmp_path / "saved")):
        assert isinstance(each.face_detector, TorchScriptFaceDetector)
        output = each(**small(face_box=None, height=64, width=128))
        assert output.face_box == pytest.approx((40, 20, 16, 18))
        assert output.warnings == ()


@pytest.mark.gpu
def test_a_gpu_seed_is_drawn_on_the_gpu(toy_model: Path) -> None:
    pipeline = load(toy_model).to("cuda")
    first, again = (
        pipeline(**small(generator=torch.Generator("cuda").manual_seed(5))).frames for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.device.type == "cuda"


def encoded_small(pipeline: HunyuanVideoAvatarPipeline) -> Conditioning:
    arguments = small()
    del arguments["output_type"], arguments["generator"], arguments["num_inference_steps"]
    arguments["voices"] = [Voice(arguments.pop("audio"), arguments.pop("face_box"))]
    return pipeline.encode(**arguments)


class RefuseToWait(TorchDispatchMode):
    """Takes "meta" for a GPU: nothing may bring numbers there, or from there, that is waited for.

    Whatever asks for a value of such a tensor fails by itself.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy):
            waits = not (kwargs or {}).get("non_blocking") and True not in args[2:]
            assert not (waits and len({x.device for x in tensors}) > 1), func
        elif func.overloadpacket is torch.ops.aten.index:  # by a list: its numbers are sent
            assert all(x.device.type == "cpu" for x in tensors), func
        return out


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_no_step_of_the_loop_sends_numbers_and_waits_for_them(
    toy_model: Path, guidance_scale: float
) -> None:
    pipeline = load(toy_model)
    conditioning = encoded_small(pipeline)
    moved: dict[str, Any] = {
        name: x.to("meta")
        for name, x in vars(conditioning).items()
        if isinstance(x, Tensor) and name != "prompt_mask"  # which is read on the CPU
    }
    conditioning = replace(conditioning, **moved)
    pipeline.transformer.to("meta")
    options = DenoiseOptions(num_inference_steps=12, guidance_scale=guidance_scale)
    with contextlib.ExitStack() as from_now_on:

        def refuse_to_wait(step: int, num_steps: int) -> None:
            if step == 1:
                from_now_on.enter_context(RefuseToWait())

        pipeline.denoise(conditioning, options, watch=Watch(on_step=refuse_to_wait))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_loop_does_not_wait_for_the_gpu(toy_model: Path) -> None:
    pipeline = load(toy_model).to("cuda")
    conditioning = encoded_small(pipeline)

    def refuse_to_wait(step: int, num_steps: int) -> None:
        torch.cuda.set_sync_debug_mode("error")  # from the second step on

    try:
        options = DenoiseOptions(num_inference_steps=12)
        pipeline.denoise(conditioning, options, watch=Watch(on_step=refuse_to_wait))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_each_component_runs_in_its_own_dtype(toy_model: Path) -> None:
    dtypes = {"transformer": torch.bfloat16, "vae": torch.float16, "default": torch.bfloat16}
    pipeline = HunyuanVideoAvatarPipeline.from_pretrained(toy_model, dtype=dtypes)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.audio_encoder.dtype == torch.float32
    frames = pipeline(**small(output_type="pt")).frames
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
