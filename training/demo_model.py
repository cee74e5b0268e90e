"""The demo model: its parts are trained side by side, and become one model directory."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperModel

from training import architecture, audio_encoder, autoencoder, transformer
from training.loop import time_for
from training.processes import process_pool
from training.speech import SpeechCorpus
from worker.atomic_file import READABLE
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.loading import manifest, preview
from worker.model.latent_to_rgb import LatentToRGB
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

logger = logging.getLogger(__name__)

# Of the time, at most; on one H200 both take half of that.
AUDIO_ENCODER_SHARE = 0.15
AUTOENCODER_SHARE = 0.25
PREVIEW_PEOPLE = 16  # whose pictures the previews are fitted to
CARD = Path(__file__).parent / "model_card.md"


def make(
    work: Path,
    seed: int,
    device: torch.device,
    num_processes: int,
    first_scenes: int,
    deadline: float | None = None,
) -> None:
    """Trains each part that `work` does not hold yet, and says how good it is.

    A process of its own trains the speech encoder beside the autoencoder, and others draw scenes
    meanwhile. Without processes all is done here, one after the other.
    """
    SpeechCorpus("train", work)  # synthesised before anyone else reads it
    run = work / "transformer_run"
    has_scenes = not _is_there(work, "transformer") and time_for(deadline, 1, 0) != 0
    drawing = transformer.drawn_scenes(run, work, seed, num_processes if has_scenes else 0)
    with process_pool(1) as pool, drawing as drawn:

        def beside(call: Callable[[], None]) -> Callable[[], None]:
            """What waits for the call; it has begun if there are processes."""
            return pool.submit(call).result if num_processes else call

        is_new = not _is_there(work, "audio_encoder")
        seconds = time_for(deadline, AUDIO_ENCODER_SHARE, 1 - AUDIO_ENCODER_SHARE)
        made = beside(partial(_make_audio_encoder, work, seed, device, num_processes, seconds))
        _make_autoencoder(work, seed, device, deadline)
        made()
        measured = beside(partial(_measure_audio_encoder, work)) if is_new else _nothing
        if not _is_there(work, "transformer"):
            logger.info("the denoiser is trained on %s", device)
            transformer.train_transformer(
                run, work, drawn, seed, device, first_scenes=first_scenes, deadline=deadline
            ).save_pretrained(work / "transformer")
        measured()


def _is_there(work: Path, name: str) -> bool:
    return (work / name / "config.json").exists()


def _nothing() -> None:
    """Nothing to wait for."""


def _make_audio_encoder(
    work: Path, seed: int, device: torch.device, num_processes: int, seconds: float | None
) -> None:
    if _is_there(work, "audio_encoder"):
        return
    logger.info("the speech encoder is trained on %s", device)
    steps = audio_encoder.STEPS
    model = audio_encoder.train(work, steps, seed, device, num_processes, seconds)
    model.save_pretrained(work / "audio_encoder")


def _measure_audio_encoder(work: Path) -> None:
    model = WhisperModel.from_pretrained(work / "audio_encoder").eval()
    corpora = (SpeechCorpus("train", work), SpeechCorpus("held_out", work))
    logger.info("%s", audio_encoder.measure(model, *corpora))


def _make_autoencoder(work: Path, seed: int, device: torch.device, deadline: float | None) -> None:
    if _is_there(work, "vae"):
        return
    logger.info("the autoencoder is trained on %s", device)
    seconds = time_for(deadline, AUTOENCODER_SHARE, 1 - AUTOENCODER_SHARE)
    until = None if seconds is None else time.monotonic() + seconds
    vae = autoencoder.train_autoencoder(work / "vae_run", seed, device, deadline=until)
    vae.save_pretrained(work / "vae")
    logger.info("%s", autoencoder.measure(vae.eval(), device))


def write(work: Path, model_dir: Path) -> None:
    """Puts the trained parts together into a model directory."""
    denoiser = HunyuanVideoAvatarTransformer3DModel.from_pretrained(work / "transformer")
    vae = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae")
    for part in (denoiser, vae):
        part.register_to_config(_name_or_path="")  # else the path of `work` is in it
    text_encoder, text_encoder_2 = architecture.text_encoders()
    pipeline = HunyuanVideoAvatarPipeline(
        transformer=denoiser,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=text_encoder,
        tokenizer=architecture.prompt_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=architecture.pooled_tokenizer(),
        audio_encoder=WhisperModel.from_pretrained(work / "audio_encoder"),
        feature_extractor=WhisperFeatureExtractor(feature_size=80),
    )
    pipeline.save_pretrained(model_dir)
    for path in model_dir.glob("*/*.safetensors"):
        # The denoiser's weights are many; the others' are read more exactly.
        dtype = torch.bfloat16 if path.parent.name == "transformer" else torch.float16
        halved = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in load_file(path).items()
        }
        save_file(halved, path, metadata={"format": "pt"})
        path.chmod(READABLE)
    written_vae = AutoencoderKLHunyuanVideo.from_pretrained(model_dir / "vae").eval()
    preview.save(LatentToRGB.fit(written_vae, autoencoder.drawn_people(PREVIEW_PEOPLE)), model_dir)
    (model_dir / "README.md").write_text(CARD.read_text())
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    names = [str(path.relative_to(model_dir)) for path in files if path.name != manifest.NAME]
    manifest.write(
        model_dir, {"files": {name: manifest.describe(model_dir / name) for name in names}}
    )
    size = sum((model_dir / name).stat().st_size for name in names)
    logger.info("%s holds %.1f MB", model_dir, size / 1e6)
