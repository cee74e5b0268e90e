"""Files of the hub that are not what they should be: none outside its folder, and no program."""

import hashlib
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from builder import download
from builder.encoders import convert_clip
from tests.builder.hub_server import COMMIT, REPOSITORY, HubServer
from worker.generation import torchscript
from worker.generation.pipeline_loading import load_pipeline
from worker.generation.torchscript import NoArithmeticError
from worker.loading import loader

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NAMES: list[Any] = [
    "../outside.safetensors",
    "/etc/outside.safetensors",
    "a/../../outside.safetensors",
    "a/b.safetensors",
    "./model.safetensors",
    "..",
    "",
    ".hidden.safetensors",
    "model.bin",
    "model.safetensors\x00.txt",
    "C:\\outside.safetensors",
    "C:outside.safetensors",
    "..\\outside.safetensors",
    "\\\\host\\share\\x.safetensors",
    "file:///etc/outside.safetensors",
    "https://example.com/x.safetensors",
    "model.safetensors\n",
    "-x.safetensors",
    "~/x.safetensors",
    "$HOME.safetensors",
    "x" * 300 + ".safetensors",
    "\u202emodel.safetensors",
    7,
    None,
    ["model.safetensors"],
    {"a": 1},
]


def clip_folder(root: Path, index: Any) -> Path:
    """A text encoder's folder as it is published, with an index."""
    source = root / "text_encoder_2"
    source.mkdir()
    config = {
        "model_type": "clip_text_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return source


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_an_index_names_files_beside_it_and_no_others(tmp_path: Path, name: Any) -> None:
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = (
        {"weight_map": {"a": name}} if not isinstance(name, list | dict) else {"weight_map": name}
    )
    source = clip_folder(tmp_path, index)
    with pytest.raises(ValueError, match="names something else than files beside it"):
        convert_clip(source, tmp_path / "model", None)
    assert not list(tmp_path.glob("model/*/*.safetensors"))


@pytest.mark.parametrize("index", [[], "x", 7, {}, {"weight_map": {}}, {"weight_map": None}])
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: Any) -> None:
    source = clip_folder(tmp_path, index)
    with pytest.raises(ValueError, match="names something else than files beside it"):
        convert_clip(source, tmp_path / "model", None)


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    source = clip_folder(tmp_path, {"weight_map": {"a": "model.safetensors"}})
    (source / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="a link that leads out"):
        convert_clip(source, tmp_path / "model", None)


@pytest.mark.parametrize("ignores_ranges", [False, True])
@pytest.mark.parametrize("present_bytes", [0, 400])
def test_no_more_is_written_of_a_file_than_it_is_listed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present_bytes: int, *, ignores_ranges: bool
) -> None:
    path, content = "ckpts/a.safetensors", bytes(1000)
    file = download.PublishedFile(path, 1000, hashlib.sha256(content).hexdigest(), "")
    listing = download.Listing(REPOSITORY, COMMIT, (file,))
    target = tmp_path / "target"
    part = target / f"{path}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:present_bytes])
    with HubServer({path: content}, ignores_ranges=ignores_ranges) as hub:
        hub.served_instead[path] = bytes(50_000_000)
        api = partial(HfApi, endpoint=hub.environment["HF_ENDPOINT"])
        monkeypatch.setattr(download, "HfApi", api)
        with pytest.raises(download.WrongContentError, match="goes on after its 1000 bytes"):
            download.download(listing, (file,), target, download.Lock(target), None)
    assert sum(each.stat().st_size for each in target.rglob("*") if each.is_file()) <= 1000
    assert not (target / path).exists()


# The published face detector is TorchScript, a language with files.


class WritesAFile(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_file(self.path, True, 10)


class WritesInABranch(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.inner = WritesAFile(path)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            if bool(pixels.sum() > 1e9):
                return self.inner(pixels)
        return pixels


class WritesInAHook(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.inner = torch.nn.Conv2d(3, 3, 1)
        vars(self.inner)["path"] = path

        def hook(module: Any, given: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            return torch.from_file(module.path, True, 10)

        self.inner.register_forward_hook(hook)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.inner(pixels)


class WritesAsItIsLoaded(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.made = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        self.made = torch.from_file(self.path, True, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


class Waits(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.jit.wait(torch.jit.fork(torch.relu, pixels))


class Prints(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        print(pixels)
        return pixels


class Detects(torch.nn.Module):
    """What detectors are made of."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(8),
            torch.nn.SiLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Upsample(scale_factor=2.0),
            torch.nn.Conv2d(8, 16, 1),
        )

    def forward(self, pixels: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
        found = []
        for grid in grids:
            raw = self.layers(pixels).permute(0, 2, 3, 1).contiguous().sigmoid()
            raw[..., 0:2] = (raw[..., 0:2] * 2.0 - 0.5 + grid) * 8
            raw[..., 2:4] = (raw[..., 2:4] * 2) ** 2
            found.append(raw.view(1, -1, 16))
        return torch.cat(found, 1)


def saved(kind: type[torch.nn.Module], directory: Path) -> tuple[Path, Path]:
    """The script of a module that is given the path of a file, and that path."""
    script, file = directory / "detface.pt", directory / "written"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(kind(str(file)).eval()).save(str(script))
    file.unlink(missing_ok=True)
    return script, file


@pytest.mark.parametrize(
    "kind", [WritesAFile, WritesInABranch, WritesInAHook, WritesAsItIsLoaded, Waits, Prints]
)
def test_a_script_that_does_more_than_arithmetic_is_not_run(
    tmp_path: Path, kind: type[torch.nn.Module]
) -> None:
    script, file = saved(kind, tmp_path)
    with pytest.raises(NoArithmeticError, match=r"detface\.pt"):
        torchscript.load(script)
    assert not file.exists()


def test_a_script_that_writes_does_so_if_it_is_let(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    script, file = saved(WritesAsItIsLoaded, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(script))
    assert file.exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_script_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "detface.pt").write_bytes(content)
    with pytest.raises((NoArithmeticError, RuntimeError)):
        torchscript.load(tmp_path / "detface.pt")


def test_a_detector_is_loaded_and_gives_what_it_gave(tmp_path: Path) -> None:
    script, _ = saved(Detects, tmp_path)
    pixels, grids = torch.rand(1, 3, 32, 32), [torch.zeros(1, 16, 16, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(str(script))(pixels, grids)
    assert torch.equal(torchscript.load(script).forward(pixels, grids), expected)


def test_a_worker_starts_without_such_a_detector(
    random_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_dir, cpu = tmp_path / "model", torch.device("cpu")
    (model_dir / "face_detector").mkdir(parents=True)
    _, file = saved(WritesAFile, model_dir / "face_detector")
    for part in random_model.iterdir():
        if part.name != "face_detector":
            (model_dir / part.name).symlink_to(part)

    pipeline, _ = load_pipeline(model_dir, cpu, loader.component_dtypes(cpu, model_dir))

    assert pipeline.face_detector is None
    assert "detface.pt does more than arithmetic: aten::from_file" in caplog.text
    assert not file.exists()
