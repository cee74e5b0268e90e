"""`python -m worker doctor`: what keeps a worker from starting, and why, on one page.

First the chain of imports from torch to the handler, then the machine. Each check of an import
loads real classes, as the worker does and in its order, and runs something tiny: `import
transformers` succeeds with a broken torchvision, because its classes are imported when they are
first used. A failure is named by the exception at the bottom of its chain; the libraries' own last
line often says no more than "Could not import module".

A new check is a function that returns one line and raises if something is wrong, and its line in
IMPORTS or MACHINE.
"""

import functools
import importlib.metadata
import importlib.util
import json
import platform
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import psutil

from avatar_client.environment import misspelt
from avatar_client.version import __version__
from worker import import_guard
from worker.loading import disk, model_directory
from worker.settings import Settings

GIB = 2**30
NUM_READERS = 16
READ_BYTES = 16 * 2**20
READ_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """One link of the chain. `run` returns what it found in one line, or raises."""

    name: str
    run: Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check came to."""

    name: str
    state: Literal["ok", "skipped", "failed"]
    text: str  # what was found; for a failure, its root cause
    seconds: float = 0.0
    where: str | None = None  # file and line of the root cause
    chain: tuple[str, ...] = ()  # the failure as it was raised, then what each came from


class NotApplicableError(Exception):
    """Raised by a check of something that this worker leaves out or does not need."""


def check_torch() -> str:
    import torch

    product = torch.eye(2) @ torch.ones(2)
    _require(product.tolist() == [1.0, 1.0], f"a 2 x 2 product came out as {product.tolist()}")
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"


def check_import_guard() -> str:
    report = import_guard.ensure()
    faults = [package.fault() for package in report.packages.values() if package.error]
    statuses = [f"{name} {package.status}" for name, package in report.packages.items()]
    summary = f"{', '.join(statuses)}; image processors use {report.image_processor_backend}"
    return "\n".join([summary, *faults])


def check_image_processors() -> str:
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPImageProcessor

    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    pixel_values = processor(Image.new("RGB", (24, 32)), return_tensors="pt")["pixel_values"]
    _require(pixel_values.shape == (1, 3, 16, 16), f"pixel values of shape {pixel_values.shape}")
    return f"{AutoImageProcessor.__name__}; {type(processor).__name__} ran"


def check_transformers() -> str:
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPTextConfig,
        CLIPTextModel,
        LlavaForConditionalGeneration,
        WhisperFeatureExtractor,
        WhisperModel,
    )

    classes = (AutoTokenizer, LlavaForConditionalGeneration, WhisperFeatureExtractor, WhisperModel)
    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=1,
        eos_token_id=7,
    )
    hidden = CLIPTextModel(config)(input_ids=torch.tensor([[1, 2, 7]])).last_hidden_state
    _require(hidden.shape == (1, 3, 8), f"CLIPTextModel answered with the shape {hidden.shape}")
    return f"{_names(classes)}; CLIPTextModel ran"


def check_diffusers() -> str:
    import torch
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        DiffusionPipeline,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoTransformer3DModel,
    )

    classes = (AutoencoderKLHunyuanVideo, DiffusionPipeline, HunyuanVideoTransformer3DModel)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    noise = torch.ones(1)
    stepped = scheduler.step(noise, scheduler.timesteps[0], noise).prev_sample
    _require(stepped.tolist() == [0.5], f"half an Euler step from 1 ended at {stepped.tolist()}")
    return f"{_names(classes)}; FlowMatchEulerDiscreteScheduler ran"


def check_model() -> str:
    from worker.generation.pipeline import HunyuanVideoAvatarPipeline
    from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

    return _names((HunyuanVideoAvatarTransformer3DModel, HunyuanVideoAvatarPipeline))


def check_handler() -> str:
    return f"{import_module('handler').__name__}.py"  # from the working directory, as in the image


def check_local_endpoint() -> str:
    if importlib.util.find_spec("local_endpoint") is None:
        raise NotApplicableError("local_endpoint is not part of this installation")
    return import_module("local_endpoint").__name__


def check_settings() -> str:
    settings = Settings.from_env()
    return f"model {settings.avatar_model}, bucket {'set' if settings.bucket else 'not set'}"


def check_gpu() -> str:
    _require_production_model()
    import torch

    from worker.generation import engine

    engine.check_gpu()
    properties = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{free_bytes / GIB:.0f} of {total_bytes / GIB:.0f} GiB free, "
        f"driver for CUDA {_cuda_of_driver()}"
    )


def check_memory_plan() -> str:
    settings = _require_production_model()
    import torch

    from worker.generation import pipeline_loading

    if not torch.cuda.is_available():
        raise NotApplicableError("no GPU is visible")
    model_dir = model_directory.find(settings).path
    return str(pipeline_loading.plan_memory(model_dir, torch.device("cuda"), settings.memory_plan))


def check_weights() -> str:
    found = model_directory.find(_require_production_model())
    return f"{found}; {sum(map(_size, found.path.rglob('*'))) / 1e9:.1f} GB, every file whole"


def check_disk_speed() -> str:
    """Reads from the largest file of the model past the page cache, as the loader does."""
    path = max(model_directory.find(_require_production_model()).path.rglob("*"), key=_size)
    try:
        bytes_per_second = disk.speed(path, NUM_READERS, READ_BYTES, READ_SECONDS)
    except OSError:
        raise NotApplicableError("this file system reads through the page cache only") from None
    return f"{bytes_per_second / 1e9:.2f} GB/s, {NUM_READERS} readers, {path.name}"


def check_encoders() -> str:
    from worker.media import encoding

    encoding.check_encoders()
    return ", ".join(encoding.encoder_names())


def check_provenance() -> str:
    from worker.media.provenance import Credentials

    credentials = Credentials.of(Settings.from_env())
    if credentials is None:
        raise NotApplicableError("no certificate is set up: videos say it by plain metadata")
    credentials.check()
    return "C2PA, with the certificate that is set"


def check_storage() -> str:
    settings = Settings.from_env()
    if misspelt_names := [line for line in misspelt(Settings) if line.startswith("BUCKET_")]:
        raise ValueError(" ".join(misspelt_names))
    if missing := settings.missing_bucket_variables:
        raise ValueError(f"a bucket is set up in part: {', '.join(missing)} missing")
    bucket = settings.bucket
    if bucket is None:
        raise NotApplicableError("no bucket is set up: none of BUCKET_* names one")
    from worker.media.storage import Storage

    storage = Storage(bucket)
    storage.check()
    return f"bucket {storage.bucket_name} takes objects and gives them out"


def check_uptime() -> str:
    seconds = time.time() - psutil.Process(1).create_time()
    return f"the container's first process started {seconds:.0f} s ago"


IMPORTS = (
    Check("torch", check_torch),
    Check("import guard", check_import_guard),
    Check("image processors", check_image_processors),
    Check("transformers", check_transformers),
    Check("diffusers", check_diffusers),
    Check("model", check_model),
    Check("handler", check_handler),
    Check("local endpoint", check_local_endpoint),
)
MACHINE = (
    Check("settings", check_settings),
    Check("GPU", check_gpu),
    Check("weights", check_weights),
    Check("memory plan", check_memory_plan),
    Check("disk speed", check_disk_speed),
    Check("encoders", check_encoders),
    Check("provenance", check_provenance),
    Check("storage", check_storage),
    Check("uptime", check_uptime),
)


def examine(check: Check) -> Finding:
    """What the check comes to: nothing that it raises gets out."""
    started = time.perf_counter()
    try:
        text = check.run()
    except NotApplicableError as reason:
        return Finding(name=check.name, state="skipped", text=str(reason))
    except Exception as error:
        import_guard.forget_leftovers()  # or the next check's cause would be hidden behind them
        chain = import_guard.exception_chain(error)
        return Finding(
            name=check.name,
            state="failed",
            text=_in_one_line(chain[-1]),
            where=_place(chain[-1]),
            chain=tuple(_in_one_line(link) for link in chain),
            seconds=time.perf_counter() - started,
        )
    return Finding(name=check.name, state="ok", text=text, seconds=time.perf_counter() - started)


def main(*, as_json: bool, imports_only: bool) -> int:
    """The exit code, 1 if a check failed, after the findings were printed.

    The page grows line by line, so that a check which takes the process down is the one missing.
    """
    findings = []
    for check in IMPORTS if imports_only else IMPORTS + MACHINE:
        findings.append(examine(check))
        if not as_json:
            _print(page_entry(findings[-1]))
    failed = [finding.name for finding in findings if finding.state == "failed"]
    if as_json:
        facts = {
            "ok": not failed,
            "versions": _versions(),
            "imports": import_guard.report().as_dict(),
        }
        _print(json.dumps(facts | {"checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(f"Broken: {', '.join(failed)}." if failed else "Nothing is broken.")
        _print(", ".join(f"{name} {version}" for name, version in _versions().items()))
    return 1 if failed else 0


def page_entry(finding: Finding) -> str:
    """The finding for a reader: its state, name and seconds, then its text, beside and below."""
    lines = finding.text.splitlines()
    lines[0] = f"{finding.state:8}{finding.name:17}{finding.seconds:5.1f} s  {lines[0]}"
    indent = " " * 10
    wrap = functools.partial(
        textwrap.fill,
        width=100,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    entry = [wrap(lines[0]), *(wrap(line, initial_indent=indent) for line in lines[1:])]
    if finding.state == "failed":
        entry.append(f"{indent}at {finding.where}")  # not wrapped: a path is copied as a whole
        if len(finding.chain) > 1:
            entry.append(wrap(f"seen as {finding.chain[0]}", initial_indent=indent))
    return "\n".join(entry)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _require_production_model() -> Settings:
    settings = Settings.from_env()
    if settings.avatar_model == "demo":
        raise NotApplicableError("the demo model needs none")
    return settings


def _cuda_of_driver() -> str:
    """The newest CUDA that the GPU's driver knows."""
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _names(classes: Iterable[type]) -> str:
    return ", ".join(each.__name__ for each in classes)


def _in_one_line(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _place(error: BaseException) -> str | None:
    """File and line that raised it, if Python code did."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _versions() -> dict[str, str]:
    versions = {"avatar-worker": __version__, "Python": platform.python_version()}
    for name in ("torch", *import_guard.LIBRARIES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
