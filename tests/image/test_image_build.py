"""The Dockerfile run without Docker: every stage in order, until each image answers a job.

A root of Debian with its Python stands in for the image of Python, the toy checkpoint behind a
token for the published one, and the machine's own torch for that of CUDA. Needs root, debootstrap
and the package index.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from builder.download import VARIANTS
from local_endpoint import LocalEndpoint
from tests.builder.hub_server import HubServer
from tests.builder.toy_repository import ROOT, toy_repository
from tests.image.dockerfile import Builder, Image, context_files, parse
from worker.loading.model_directory import BAKED_DIR

pytestmark = [
    pytest.mark.image,
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot and overlays need root"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed"),
]

TOKEN = "hf_token_of_this_build"
BASE = "python:3.12-slim-bookworm"
BASE_ROOT = ROOT / ".cache" / "bookworm-with-python"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "tcc", "nvcc", "rustc", "go")
OF_CUDA = (
    "torch==",
    "triton==",
    "nvidia-",
    "cuda-toolkit==",
    "flash-attn-4==",
    "quack-kernels==",
)
MAX_CODE_BYTES = 10 * 10**9


@pytest.fixture(scope="module")
def base_root() -> Path:
    """What the image of Python is to the Dockerfile; kept, as a pulled image is."""
    if not BASE_ROOT.is_dir():
        part = BASE_ROOT.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm"]
        subprocess.run([*command, part], check=True, stdout=subprocess.DEVNULL)
        (part / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        part.rename(BASE_ROOT)
    return BASE_ROOT


def package_index() -> tuple[dict[str, str], list[Path]]:
    """How this machine's pip reaches its packages: its options, and the paths that they name."""
    options: dict[str, str] = {}
    paths = []
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    for name, value in re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.M):
        if name in ("cert", "index-url", "extra-index-url", "find-links", "proxy"):
            options[f"PIP_{name.upper().replace('-', '_')}"] = value
            for word in value.split():
                path = Path(urlsplit(word).path)
                if word.startswith("file:"):
                    paths.append(path.parent)  # the files lie beside the index
                elif path.is_absolute() and path.exists():
                    paths.append(path)
    return options, sorted(set(paths))


def build_context(directory: Path, network: Mapping[str, str]) -> Path:
    """What the builder is sent, with this machine's torch in the list of packages.

    Where torch is that of CUDA, it is the one that stands there already.
    """
    for name in (".dockerignore", "Dockerfile", *context_files(ROOT)):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    if "+" in torch.__version__:
        wheels = directory.with_name("torch")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(wheels),
        ]
        subprocess.run([*pip, f"torch=={torch.__version__}"], check=True, env=os.environ | network)
        [wheel] = wheels.iterdir()
        with wheel.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        path = directory / "builder" / "requirements.txt"
        entries = re.split(r"\n(?=\S)", path.read_text().rstrip("\n"))
        kept = [entry for entry in entries if not entry.startswith(OF_CUDA)]
        entry = f"torch=={torch.__version__} --hash=sha256:{sha256}"
        path.write_text("\n".join([*kept, entry, ""]))
    return directory


@pytest.fixture(scope="module")
def images(
    base_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Image]]:
    """Every stage of the Dockerfile."""
    scratch = tmp_path_factory.mktemp("build")
    token = scratch / "token"
    token.write_text(f"{TOKEN}\n")
    network, shared = package_index()
    with HubServer(toy_repository(tmp_path_factory.mktemp("published")), token=TOKEN) as hub:
        builder = Builder(
            context=build_context(scratch / "sources", network),
            images={BASE: base_root},
            scratch=scratch,
            arguments={
                "CUDA_VERSION": str(torch.version.cuda),
                "HF_ENDPOINT": hub.environment["HF_ENDPOINT"],
                "WEIGHTS_REVISION": hub.commit,
            },
            secrets={"hf_token": token},
            network=network,
            shared=shared,
        )
        with builder.build(parse(ROOT / "Dockerfile")) as made:
            yield made


def image_of(images: Mapping[str, Image], variant: str) -> Image:
    """The image with the variant inside; the last one is that of the code alone."""
    return images[f"worker-{variant}"] if variant in VARIANTS else list(images.values())[-1]


@pytest.mark.parametrize("variant", [*VARIANTS, "code alone"])
def test_the_images_own_command_answers_a_job_and_ends_when_told(
    images: Mapping[str, Image],
    variant: str,
    own_endpoint: LocalEndpoint,
    tmp_path: Path,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> None:
    image = image_of(images, variant)
    worker_id = f"image-{variant.replace(' ', '-')}"
    home = Path("/home/avatar")
    environment = own_endpoint.worker_environment(worker_id, home)
    if variant not in VARIANTS:
        environment["AVATAR_MODEL"] = "demo"
    job = {
        "image": base64.b64encode(make_portrait()).decode(),
        "audio": base64.b64encode(make_speech(seconds=0.2)).decode(),
        "resolution": 256,
        "num_inference_steps": 2,
    }
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        process = image.start([*image.entrypoint, *image.command], environment, {}, output)
    try:
        while not own_endpoint.wait_for_worker(worker_id, timeout_seconds=1):
            assert process.poll() is None, log.read_text()
        done = own_endpoint.wait(own_endpoint.submit({"input": job}), timeout_seconds=600)
        assert done.status == "COMPLETED", log.read_text()
        assert base64.b64decode(done.output["video_base64"])[4:8] == b"ftyp"
        if variant in VARIANTS:
            assert f"model directory /{BAKED_DIR} (the image)" in log.read_text()
        [first] = psutil.Process(process.pid).children()
        assert first.name() == "tini"
        assert first.children()[0].uids().real == 1000
        first.terminate()
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("variant", [*VARIANTS, "code alone"])
def test_an_image_holds_no_compiler_no_token_and_no_source_of_the_weights(
    images: Mapping[str, Image], variant: str
) -> None:
    image = image_of(images, variant)
    for directory in image.environment["PATH"].split(":"):
        for compiler in COMPILERS:
            assert not (image.root / directory[1:] / compiler).exists()
    for layer in image.layers[:-1]:  # but for the image of Python
        assert subprocess.run(["grep", "--recursive", "--quiet", TOKEN, layer]).returncode == 1
    assert not list(image.root.glob("models/*.sources"))
    assert not list(image.root.glob("models/**/*.pt.part"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_belong_to_the_user_that_reads_them(
    images: Mapping[str, Image], variant: str
) -> None:
    image = image_of(images, variant)
    for path in (image.root / BAKED_DIR).rglob("*"):
        assert str(path.stat().st_uid) == image.user == "1000"


@pytest.mark.parametrize("variant", [*VARIANTS, "code alone"])
def test_an_image_lists_its_packages_and_holds_no_tool_for_it(
    images: Mapping[str, Image], variant: str
) -> None:
    root = image_of(images, variant).root
    document = json.loads((root / "usr/share/sbom/python-packages.cdx.json").read_text())
    listed = {component["name"].lower() for component in document["components"]}
    assert document["bomFormat"] == "CycloneDX"
    assert {"torch", "diffusers", "runpod", "av", "pillow"} <= listed
    assert "cyclonedx-bom" not in listed
    assert not (root / "opt/tools").exists()


def test_the_image_of_the_code_alone_is_at_most_10_gb(images: Mapping[str, Image]) -> None:
    sizes = [
        sum(path.lstat().st_size for path in layer.rglob("*"))
        for layer in image_of(images, "code alone").layers
    ]
    assert 0 < sum(sizes) < MAX_CODE_BYTES
