"""The training's parts: what they compute is what the worker and the libraries compute."""

import json
import operator
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import psutil
import pytest
import torch

from training import __main__ as command
from training import (
    architecture,
    audio_encoder,
    autoencoder,
    demo_model,
    report,
    speech,
    transformer,
    world,
)
from training.convolution import inflate_kernels, use_fast_convolutions, with_library_convolutions
from training.loop import CHECKPOINT, LOG, LossGradients, progress_of, steps_done, train
from training.muon import Muon
from training.processes import prefetched
from training.scenes import (
    EYES_CROP,
    FACE_CROP,
    Scene,
    SceneBuffer,
    Shot,
    encode_frames,
    num_frames,
)
from training.speech import formant_speech
from training.transformer import Chances, Windows, denoising_loss
from worker.generation import sampling
from worker.loading import loader, preview
from worker.loading.model_directory import require_whole
from worker.shapes import WINDOW_LATENTS, FrameSize, VideoPlan

SMALL = FrameSize(32, 32)  # pixels


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_scene(num_latents: int, size: FrameSize = SMALL, people: int = 1) -> Scene:
    """A scene of numbers that all differ."""
    height, width = size.latent
    generator = torch.Generator().manual_seed(num_latents)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    return Scene(
        latents=random(16, num_latents, height, width),
        audio_embeds=random(people, num_frames(num_latents), *architecture.AUDIO_STATES),
        reference_mean=random(16, 1, height, width),
        reference_std=random(16, 1, height, width) / 10,
        face_mask=random(people, 1, height, width),
        prompt_embeds=random(2, 5 + num_latents % 3, architecture.TEXT_DIM),
        pooled_prompt_embeds=random(2, architecture.POOLED_DIM),
        pose=torch.tensor(25.0),
        expression=torch.tensor(30.0),
        weight=1 + random(height, width),
        outside=(random(height, width) > 0.5).float(),
        places=random(people, 3),
    )


def test_our_muon_steps_as_torchs_does() -> None:
    torch.manual_seed(0)
    shapes = [(8, 20), (20, 8), (8, 20), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]
    start = [value.detach().clone() for value in ours]
    theirs = [torch.nn.Parameter(value.clone()) for value in start]
    optimizers = (
        Muon(ours, lr=0.02),
        torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.01),
    )
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        # theirs computes in bfloat16 on a CPU too
        assert (mine - other).norm() < 0.03 * (other - before).norm()


@pytest.mark.parametrize("frames", [1, 5])
def test_the_trained_convolutions_give_the_models_own_numbers(frames: int) -> None:
    torch.manual_seed(1)
    own = architecture.autoencoder().eval()
    trained = architecture.autoencoder().eval()
    trained.load_state_dict(own.state_dict())
    use_fast_convolutions(trained)
    pixels = torch.randn(1, 3, frames, 32, 32)
    with torch.no_grad():
        wanted = own.decode(own.encode(pixels).latent_dist.mean).sample
        assert torch.allclose(
            trained.decode(trained.encode(pixels).latent_dist.mean).sample, wanted, atol=1e-4
        )
        back = with_library_convolutions(trained.state_dict(), architecture.autoencoder()).eval()
        assert torch.equal(back.decode(back.encode(pixels).latent_dist.mean).sample, wanted)


@pytest.mark.parametrize("frames", [1, 9, 17, 41, 173])
def test_stretches_that_are_encoded_together_give_the_models_own_latents(frames: int) -> None:
    torch.manual_seed(1)
    vae = architecture.autoencoder().eval()
    clip = torch.randn(3, frames, 32, 32)
    with torch.no_grad():
        wanted = vae.encode(clip[None]).latent_dist.mean[0]
        use_fast_convolutions(vae)
        assert torch.allclose(encode_frames(vae, clip), wanted, atol=1e-5)


def test_inflated_kernels_encode_a_still_as_before() -> None:
    torch.manual_seed(2)
    vae = architecture.autoencoder().eval()
    use_fast_convolutions(vae)
    pixels = torch.randn(1, 3, 1, 32, 32)
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist.mean
        inflate_kernels(vae)
        assert torch.allclose(vae.encode(pixels).latent_dist.mean, before, atol=1e-4)
        clip = vae.encode(pixels.expand(-1, -1, 9, -1, -1)).latent_dist.mean
    assert torch.allclose(clip, before.expand_as(clip), atol=1e-4)


def test_a_window_has_the_audio_that_the_worker_gives_it() -> None:
    scene = make_scene(50, people=2)
    for start in (0, 3, 17):
        window = scene.window(start, WINDOW_LATENTS)
        assert torch.equal(window.latents, scene.latents[:, start : start + WINDOW_LATENTS])
        expected = sampling.window_audio(scene.audio_embeds, start, 50)
        assert torch.equal(window.audio_embeds, expected)


def test_a_circular_window_has_the_audio_that_the_worker_gives_it() -> None:
    plan = VideoPlan(375)
    ring = plan.sampled_latents
    scene = make_scene(ring, people=2)
    audio = scene.audio_embeds.clone()
    audio[:, plan.padded_audio_frames :] = 0
    scene = replace(scene, audio_embeds=audio)
    wrapped = scene.circular_window(ring - 20, 20, WINDOW_LATENTS - 20)

    expected = sampling.window_audio(audio[:, : plan.padded_audio_frames], -20, ring)
    assert torch.equal(wrapped.audio_embeds, expected)
    latents = sampling.gather_circular(scene.latents[None], 2, -20, WINDOW_LATENTS)
    assert torch.equal(wrapped.latents, latents[0])


def test_a_full_buffer_drops_its_oldest_scenes() -> None:
    numbered = (replace(make_scene(9), pose=torch.tensor(float(n))) for n in range(100))
    buffer = SceneBuffer(numbered, 2, 3, np.random.default_rng(0))
    buffer.add(20)
    drawn = buffer.sample(64, 5)
    assert drawn.latents.shape == (64, 16, 5, *SMALL.latent)
    assert drawn.pose.min() >= 14


def test_a_face_crop_is_the_same_part_of_all_pictures() -> None:
    places = torch.arange(24.0 * 32).view(24, 32)
    scene = replace(
        make_scene(3, FrameSize(192, 256)),
        latents=places.expand(16, 3, -1, -1),
        face_mask=places[None, None],
        places=torch.tensor([[9.0, 10.5, 23.0]]),
    )
    rng = np.random.default_rng(0)
    squares = [scene.crop_face(FACE_CROP, rng) for _ in range(50)]
    for square in squares:
        assert square.latents.shape == (16, 3, 16, 16)
        assert square.reference_mean.shape == (16, 1, 16, 16)
        assert (square.latents[0, 0] == square.face_mask[0, 0]).all()
    rows, columns = corners(squares)
    assert 0 <= min(rows) < 2 < max(rows) <= 4
    assert 12 <= min(columns) < 15 < max(columns) <= 16
    eyes = scene.crop_face(EYES_CROP, rng)
    assert eyes.latents.shape == (16, 3, 4, 14)
    assert 8 <= corners([eyes])[0][0] <= 10  # from the first row that counts


def corners(crops: Sequence[Scene]) -> tuple[list[int], list[int]]:
    """The rows and the columns where crops of a picture 32 wide begin."""
    first = [divmod(int(crop.latents[0, 0, 0, 0]), 32) for crop in crops]
    return [row for row, _ in first], [column for _, column in first]


def test_crops_of_several_people_show_each_of_them() -> None:
    picture = torch.arange(24.0 * 32).view(24, 32)
    scene = replace(
        make_scene(3, FrameSize(192, 256), people=2),
        latents=picture.expand(16, 3, -1, -1),
        places=torch.tensor([[9.0, 10.5, 8.0], [9.0, 10.5, 23.0]]),
    )
    rng = np.random.default_rng(0)
    _, columns = corners([scene.crop_face(FACE_CROP, rng) for _ in range(50)])
    assert {column < 8 for column in columns} == {True, False}


@pytest.mark.parametrize(("has_cfg_loss", "people"), [(False, 1), (False, 3), (True, 2)])
def test_the_loss_trains_every_part_that_a_job_uses(has_cfg_loss: bool, people: int) -> None:
    torch.manual_seed(3)
    model = architecture.transformer()
    scenes = Scene.stack([make_scene(count, people=people).window(0, 3) for count in (4, 5, 6, 7)])
    chances = Chances.draw(4, np.random.default_rng(0), has_cfg_loss=has_cfg_loss)
    loss, metrics = denoising_loss(model, scenes, chances, has_cfg_loss=has_cfg_loss)
    loss.backward()
    assert np.isfinite(loss.item())
    assert metrics["agreement"] > 0
    moved = {
        name
        for name, value in model.named_parameters()
        if value.grad is not None and value.grad.any()
    }
    parts = ("audio_proj.", "motion_exp", "motion_pose", "ref_embedder", "proj_out")
    assert all(any(name.startswith(part) for name in moved) for part in parts)
    assert any("audio_adapter.to_out" in name for name in moved)


def test_a_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    def run(directory: Path, steps: int, seconds: float | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        inputs = torch.randn(8, 4)

        def loss(values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return (model(values) - values).square().mean(), {}

        gradients = LossGradients(model, loss)
        train(
            model,
            lambda: gradients(inputs),
            directory=directory,
            steps=steps,
            learning_rate=0.01,
            seconds=seconds,
        )
        return model.weight

    run(tmp_path / "both", 20)
    resumed = run(tmp_path / "both", 20)
    assert torch.equal(resumed, run(tmp_path / "one", 20))
    assert not torch.equal(resumed, run(tmp_path / "shorter", 10))

    stopped = run(tmp_path / "stopped", 1_000_000, seconds=0.2)
    assert 0 < steps_done(tmp_path / "stopped") < 1_000_000
    assert progress_of(tmp_path / "stopped") == 1
    assert torch.equal(stopped, run(tmp_path / "stopped", 1_000_000, seconds=60))  # it is over
    rates = [json.loads(line) for line in (tmp_path / "stopped" / LOG).read_text().splitlines()]
    assert rates[-1]["step"] == steps_done(tmp_path / "stopped")


@pytest.mark.gpu
def test_graphs_give_the_gradients_of_each_shape_of_inputs() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, device="cuda")

    def loss(values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        squares = (model(values) - values).square()
        return squares.mean(), {"largest": squares.detach().amax()}

    gradients = LossGradients(model, loss)
    for count in (8, 3, 8, 3, 8, 3):  # not recorded, recorded, played back
        inputs = torch.randn(count, 4, device="cuda")
        wanted = torch.autograd.grad(loss(inputs)[0], list(model.parameters()))
        metrics = gradients(inputs)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradient, atol=1e-6)
        assert torch.allclose(metrics["loss"], loss(inputs)[0])
        model.zero_grad()


def test_what_processes_make_comes_in_its_order() -> None:
    with prefetched(operator.neg, 2, first=3) as results:
        assert [next(results) for _ in range(30)] == [-number for number in range(3, 33)]


def test_the_processes_end_with_the_one_that_asked(tmp_path: Path) -> None:
    program = (
        "import operator, sys, time\n"
        "from training.processes import prefetched\n"
        "if __name__ == '__main__':\n"
        "    with prefetched(operator.neg, 2) as results:\n"
        "        next(results)\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        makers = psutil.Process(process.pid).children(recursive=True)
        assert len(makers) >= 2
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(makers, timeout=300)
    assert not alive


@pytest.fixture
def toy_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m training` does at toy size, and babble in the place of espeak-ng's speech."""
    monkeypatch.setattr(speech, "_espeak", lambda rng, split: formant_speech(rng, 32_000))
    for split in speech.BANK_SECONDS:
        monkeypatch.setitem(speech.BANK_SECONDS, split, 20.0)
    monkeypatch.setattr(audio_encoder, "STEPS", 2)
    monkeypatch.setattr(audio_encoder, "MEASURED_CLIPS", 1)
    monkeypatch.setattr(transformer, "SCENE_LATENTS", 9)
    monkeypatch.setattr(demo_model, "PREVIEW_PEOPLE", 1)
    stills = autoencoder.Phase("stills", 2, 1, 32, 2, 1e-3, 0.3, 1)
    clips = autoencoder.Phase("clips", 1, 5, 32, 1, 1e-3, 0.3, 1)
    whole = autoencoder.Phase("whole", 1, 17, 64, 1, 1e-3, 0.3, 1)
    train_vae = partial(autoencoder.train_autoencoder, phases=(stills, clips, whole), pictures=2)
    monkeypatch.setattr(autoencoder, "train_autoencoder", train_vae)
    monkeypatch.setattr(autoencoder, "MEASURED_PEOPLE", 1)
    monkeypatch.setattr(autoencoder, "SIZE", 64)
    monkeypatch.setattr(autoencoder, "TRACK_FRAMES", 20)
    short = transformer.Phase("short", (Windows(2, 4),), 2, 1e-3, 0.3, 1, 0.5)
    cfg = transformer.Phase(
        "cfg", (Windows(2, 3), Windows(1, 4)), 2, 1e-3, 0.3, 1, 0.5, has_cfg_loss=True
    )
    shots = (Shot(FrameSize(64, 64), 1), Shot(FrameSize(64, 128), 3))
    phases = (short, cfg)
    draw = partial(transformer.drawn_scenes, phases=phases, shots=shots)
    monkeypatch.setattr(transformer, "drawn_scenes", draw)
    train_denoiser = partial(transformer.train_transformer, phases=phases, num_shots=len(shots))
    monkeypatch.setattr(transformer, "train_transformer", train_denoiser)


def run_command(directory: Path, minutes: int) -> None:
    """Runs `python -m training` in this process, which then makes the scenes itself."""
    arguments = ["--work", directory, "--out", directory / "model", "--minutes", minutes]
    arguments += ["--device", "cpu", "--processes", 0, "--scenes", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["training", *map(str, arguments)])
        command.main()


@pytest.mark.slow
@pytest.mark.usefixtures("toy_sizes")
def test_the_training_makes_a_directory_that_the_worker_loads(tmp_path: Path) -> None:
    run_command(tmp_path, minutes=60)

    require_whole(tmp_path / "model", hashes=True)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & stat.S_IROTH for path in files)  # the image's user is another
    assert preview.load(tmp_path / "model", 16) is not None
    log = [json.loads(line) for line in (tmp_path / report.LOG_FILE).read_text().splitlines()]
    assert [(line["run"], line["step"]) for line in log] == [
        ("audio_encoder_run", 2),
        ("vae_run/stills", 2),
        ("vae_run/clips", 1),
        ("vae_run/whole", 1),
        ("transformer_run/short", 2),
        ("transformer_run/cfg", 2),
    ]
    curves = ElementTree.parse(tmp_path / report.CURVES_FILE)
    assert len(curves.findall(".//{*}text")) > 6
    components, _ = loader.load(tmp_path / "model", torch.device("cpu"), {"default": torch.float32})
    face = world.random_face(np.random.default_rng(0))
    picture = world.portrait(face, 64, 64)
    latents = components["vae"].encode(picture[None, :, None] * 2 - 1).latent_dist
    assert latents.std.max() < 0.1

    # A run that was cut, and has no time left, writes what it has.
    shutil.rmtree(tmp_path / "transformer")
    shutil.rmtree(tmp_path / "transformer_run" / "cfg")
    kept = (tmp_path / "transformer_run" / "short" / CHECKPOINT).read_bytes()
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    run_command(tmp_path, minutes=0)
    require_whole(tmp_path / "model", hashes=True)
    assert weights.read_bytes() != before
    assert not (tmp_path / "transformer_run" / "cfg").exists()
    assert (tmp_path / "transformer_run" / "short" / CHECKPOINT).read_bytes() == kept
