"""The map that previews are drawn with, fitted to a model's autoencoder."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from builder import preview as command
from tests.support.pictures import encoded
from training import world
from worker.loading import manifest, preview
from worker.loading.model_directory import DEMO_DIR, require_whole
from worker.model.latent_to_rgb import LatentToRGB, still_latents


@pytest.fixture
def model_dir(random_model: Path, tmp_path: Path) -> Path:
    """A model that has a manifest and no map."""
    shutil.copytree(random_model, tmp_path / "model")
    (tmp_path / "model" / preview.NAME).unlink()
    paths = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    files = {str(path.relative_to(tmp_path / "model")): manifest.describe(path) for path in paths}
    manifest.write(tmp_path / "model", {"files": files})
    return tmp_path / "model"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> None:
    monkeypatch.setattr(sys, "argv", ["builder.preview", *map(str, arguments)])
    command.main()


@pytest.mark.parametrize("own_pictures", [False, True])
def test_a_model_directory_is_given_a_map(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, own_pictures: bool
) -> None:
    options: list[Path | str] = []
    if own_pictures:
        (tmp_path / "pictures").mkdir()
        for number, picture in enumerate(command.drawn_pictures(6, seed=5)):
            (tmp_path / "pictures" / f"{number}.png").write_bytes(encoded(picture, "PNG"))
        options = ["--pictures", tmp_path / "pictures"]
    assert preview.load(model_dir, 4) is None

    run(monkeypatch, model_dir, *options)

    require_whole(model_dir, hashes=True)
    assert (model_dir / preview.NAME).stat().st_mode & 0o777 == 0o644  # the worker's user reads it
    assert preview.NAME in (manifest.read(model_dir) or {})["files"]
    assert preview.load(model_dir, 4) is not None
    assert preview.load(model_dir, 16) is None  # another autoencoder's


@pytest.mark.parametrize("fault", ["no model", "no picture", "too few"])
def test_what_is_missing_is_said(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    (tmp_path / "pictures").mkdir()
    if fault == "no picture":
        (tmp_path / "pictures" / "a.png").write_bytes(b"none")
    where = tmp_path if fault == "no model" else model_dir
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, where, "--pictures", tmp_path / "pictures")
    assert capsys.readouterr().err
    assert not (model_dir / preview.NAME).exists()


def test_a_damaged_map_means_no_previews_and_a_line_in_the_log(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for content in (b"", b"\xff" * 100):
        (model_dir / preview.NAME).write_bytes(content)
        assert preview.load(model_dir, 4) is None
        assert caplog.records.pop().levelname == "WARNING"


def test_the_demo_models_map_draws_what_the_autoencoder_encodes() -> None:
    vae = AutoencoderKLHunyuanVideo.from_pretrained(DEMO_DIR / "vae").eval()
    latent_to_rgb = preview.load(DEMO_DIR, vae.config.latent_channels)
    assert latent_to_rgb is not None
    face = world.random_face(np.random.default_rng(4))
    picture = world.portrait(face, 128, 128)
    drawn = latent_to_rgb(still_latents(vae, picture))
    meant = torch.nn.functional.avg_pool2d(picture[None], 4)[0]
    assert -10 * (drawn - meant).square().mean().log10() > 24  # dB


def test_a_map_that_is_none_is_refused() -> None:
    for weight, bias in (
        ((12, 4, 3), 12),
        ((12, 4, 1, 1), 12),
        ((3, 4, 3, 3), 3),
        ((12, 4, 3, 3), 3),
    ):
        with pytest.raises(ValueError, match="weight of shape"):
            LatentToRGB(torch.zeros(weight), torch.zeros(bias))
