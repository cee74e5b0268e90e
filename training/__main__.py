"""Makes the demo model, in one run that goes on where an earlier one stopped.

The speech encoder, the autoencoder and the denoiser are trained one after the other; what comes out
is a model directory as the worker loads it.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperModel

from training import architecture, audio_encoder, autoencoder, transformer
from training.speech import SpeechCorpus
from worker import manifest
from worker.demo import pooled_tokenizer, prompt_tokenizer
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.pipeline import HunyuanVideoAvatarPipeline

logger = logging.getLogger("training")

HERE = Path(__file__).parent
CARD = HERE / "model_card.md"


def main() -> None:
    """Trains what is not trained yet and writes the model."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"))
    parser.add_argument("--out", type=Path, default=Path("out/demo-model"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work, seed = arguments.work, arguments.seed

    def once(name: str, make: Callable[[], torch.nn.Module]) -> Path:
        directory = work / name
        if not (directory / "config.json").exists():
            logger.info("%s is trained", name)
            make().save_pretrained(directory)  # type: ignore[operator]
        return directory

    heard = once(
        "audio_encoder",
        lambda: audio_encoder.train(SpeechCorpus("train", work), audio_encoder.STEPS, seed),
    )
    seen = once("vae", lambda: autoencoder.train_autoencoder(work / "vae_run", seed))
    once(
        "transformer",
        lambda: transformer.train_transformer(work / "transformer_run", seen, heard, seed),
    )
    write(work, arguments.out)


def write(work: Path, model_dir: Path) -> None:
    """Puts the trained parts together into a model directory."""
    text_encoder, text_encoder_2 = architecture.text_encoders()
    pipeline = HunyuanVideoAvatarPipeline(
        transformer=HunyuanVideoAvatarTransformer3DModel.from_pretrained(work / "transformer"),
        vae=AutoencoderKLHunyuanVideo.from_pretrained(work / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=text_encoder,
        tokenizer=prompt_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=pooled_tokenizer(),
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
    (model_dir / "README.md").write_text(CARD.read_text())
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    names = [str(path.relative_to(model_dir)) for path in files if path.name != manifest.NAME]
    manifest.write(
        model_dir, {"files": {name: manifest.describe(model_dir / name) for name in names}}
    )
    size = sum((model_dir / name).stat().st_size for name in names)
    logger.info("%s holds %.1f MB", model_dir, size / 1e6)


if __name__ == "__main__":
    main()
