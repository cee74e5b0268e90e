"""What the Dockerfile says, read and not run; tests/image/test_image_build.py runs it."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlavaConfig,
    LlavaModel,
    WhisperConfig,
    WhisperModel,
)

from builder import layers
from builder.download import VARIANTS
from builder.shards import PlannedTensors, split
from tests.image.dockerfile import Stage, context_files, parse
from worker.loading.model_directory import BAKED_DIR
from worker.model.encoders import Float8LlavaModel
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
STAGES = {stage.name: stage for stage in parse(DOCKERFILE)}
LAST = list(STAGES.values())[-1]
BAKED = {variant: STAGES[f"worker-{variant}"] for variant in VARIANTS}
MODEL_DIR = f"/{BAKED_DIR}/"


def settings(stage: Stage) -> dict[str, str]:
    """What ENV sets in it and in those below it."""
    below = settings(STAGES[stage.parent]) if stage.parent in STAGES else {}
    return below | dict(word.split("=", 1) for each in stage.of("ENV") for word in each.words)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, DOCKERFILE], check=True)


def test_the_default_image_is_the_code_alone() -> None:
    assert (LAST.parent, LAST.instructions) == ("worker", ())


def test_the_code_alone_needs_no_buildkit() -> None:
    names = list(STAGES)
    for name in names[: names.index("worker") + 1]:  # those that an older builder runs for it
        assert not [run for run in STAGES[name].of("RUN") if run.flags]


@pytest.mark.parametrize("name", ["worker", "worker-bf16", "worker-fp8"])
def test_every_image_runs_the_worker_as_a_user_without_rights_and_offline(name: str) -> None:
    stage, base = STAGES[name], STAGES["base"]
    assert stage.parent == "base"
    assert [each.value for each in base.of("USER")] == ["1000"]
    assert [json.loads(each.value) for each in base.of("ENTRYPOINT")] == [["tini", "--"]]
    assert [json.loads(each.value) for each in base.of("CMD")] == [["python", "handler.py"]]
    assert not [each for each in stage.instructions if each.name not in ("COPY", "RUN")]
    assert settings(stage)["HF_HUB_OFFLINE"] == "1"
    assert settings(stage)["RUNPOD_LOG_LEVEL"] == "INFO"
    assert settings(stage)["RUNPOD_LOG_CAPTURE"] == "off"


def locked(name: str) -> dict[str, list[str]]:
    """The hashes of each package in a list, by its name and version."""
    text = (ROOT / "builder" / name).read_text()
    entries = re.split(r"\n(?=[^\s#])", text.partition("make lock\n")[2])
    return {
        entry.split()[0]: re.findall(r"--hash=(sha256:[0-9a-f]{64})", entry) for entry in entries
    }


@pytest.mark.parametrize("name", ["requirements.txt", "sbom-requirements.txt"])
def test_every_package_of_the_image_has_its_hash(name: str) -> None:
    assert all(locked(name).values())
    commands = " ".join(run.value for stage in STAGES.values() for run in stage.of("RUN"))
    installs = re.findall(r"pip install ((?:--\S+ )*)(\S+)", commands)
    assert ("--no-deps --require-hashes --requirement ", name) in installs
    assert all("--require-hashes" in options for options, _ in installs)


def test_the_image_has_the_versions_that_the_tests_run_with_and_all_that_is_declared() -> None:
    constraints: dict[str, str] = {
        canonicalize_name(line.split("==")[0]): line.split("==")[1]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    pinned = dict(name.split("==") for name in locked("requirements.txt"))
    assert {
        name: constraints.get(canonicalize_name(name), version) for name, version in pinned.items()
    } == pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["worker"]
    for requirement in map(Requirement, declared):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), "run make lock"


def test_no_secret_is_named_and_the_token_is_seen_by_the_bake_alone() -> None:
    for stage in STAGES.values():
        for instruction in stage.instructions:
            if instruction.name in ("ARG", "ENV"):
                assert not re.search("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", instruction.value)
            if "mount" in instruction.flags:
                assert instruction.flags["mount"] == "type=secret,id=hf_token"
                assert "--token-file /run/secrets/hf_token" in instruction.value
            else:
                assert "hf_token" not in instruction.value


def test_the_build_is_sent_what_the_image_consists_of_and_no_more() -> None:
    sent = context_files(ROOT)
    assert {"handler.py", "worker/__init__.py", "builder/weights.toml"} <= set(sent)
    assert not [name for name in sent if name.endswith(".pyc")]
    named = {Path(word).parts[0] for stage in STAGES.values() for word in copied_from_here(stage)}
    assert {Path(name).parts[0] for name in sent} == named


def copied_from_here(stage: Stage) -> Iterator[str]:
    for copy in stage.of("COPY"):
        if "from" not in copy.flags:
            yield from copy.words[:-1]


def test_the_hosts_are_asked_for_the_cuda_that_torch_is_built_for() -> None:
    hub = json.loads((ROOT / ".runpod" / "hub.json").read_text())
    [argument] = STAGES["packages"].of("ARG")
    built_for, *later = hub["config"]["allowedCudaVersions"]
    assert argument.value == f"CUDA_VERSION={built_for}"
    assert later == sorted(later)
    assert float(later[0]) > float(built_for)


def test_the_gpu_is_passed_in_by_every_container_runtime() -> None:
    told = settings(LAST)
    assert told["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(told["NVIDIA_DRIVER_CAPABILITIES"].split(",")) >= {"compute", "utility"}


@pytest.mark.parametrize("stage", BAKED.values(), ids=BAKED)
def test_the_weights_lie_below_the_code_and_every_layer_of_them_is_copied_once(
    stage: Stage,
) -> None:
    weights_stage = STAGES[stage.name.replace("worker", "weights")]
    *weights, code, kernels = stage.of("COPY")
    assert (code.flags, code.words) == ({"from": "worker"}, ["/app", "./"])
    assert kernels.flags == {"chown": "1000:1000", "from": "kernels"}
    assert kernels.words == ["/opt/kernels"] * 2
    count = layer_count(weights_stage)
    assert [copy.words for copy in weights] == [
        [f"/layers/{number}", MODEL_DIR] for number in range(1, count + 1)
    ]
    for copy in weights:
        assert copy.flags == {"chown": "1000:1000", "from": weights_stage.name}
    assert [run.value for run in stage.of("RUN")] == [
        f"python -m builder.verify {MODEL_DIR.removesuffix('/')}"
    ]


def layer_count(weights_stage: Stage) -> int:
    [run] = weights_stage.of("RUN")
    found = re.search(r"builder\.layers /model /layers --count (\d+)$", run.value)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_layer_of_the_published_model_is_too_large(variant: str) -> None:
    sizes = {
        f"{component}/{number}": sum(planned.num_bytes for planned in shard)
        for component, tensors in full_size(variant).items()
        for number, shard in enumerate(split(tensors))
    }
    dealt = layers.deal(sizes, layer_count(STAGES[f"weights-{variant}"]))

    totals = [sum(sizes[name] for name in names) for names in dealt]
    assert max(totals) < 0.95 * layers.MAX_LAYER_BYTES  # the small files, and the headers
    assert sum(totals) < {"bf16": 45e9, "fp8": 25e9}[variant]


def full_size(variant: str) -> dict[str, list[PlannedTensors]]:
    """The tensors of the published model, by the configurations that are published."""
    with torch.device("meta"):
        transformer = HunyuanVideoAvatarTransformer3DModel(float8_blocks=variant == "fp8")
        llava = (Float8LlavaModel if variant == "fp8" else LlavaModel)(
            LlavaConfig(
                text_config={
                    "model_type": "llama",
                    "vocab_size": 128_320,
                    "hidden_size": 4096,
                    "intermediate_size": 14_336,
                    "num_hidden_layers": 30,  # of 32; the last two are not used
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                },
                vision_config={
                    "model_type": "clip_vision_model",
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "image_size": 336,
                    "patch_size": 14,
                    "projection_dim": 768,
                },
            )
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        whisper = WhisperModel(WhisperConfig(decoder_layers=0))
        vae = AutoencoderKLHunyuanVideo()
    return {
        "transformer": planned(transformer, torch.bfloat16),
        "text_encoder": planned(llava, torch.float16),
        "text_encoder_2": planned(clip, torch.float32),
        "audio_encoder": planned(whisper, torch.float32),
        "vae": planned(vae, torch.float32),
    }


def planned(network: nn.Module, dtype: torch.dtype) -> list[PlannedTensors]:
    return [
        PlannedTensors(
            {name: (tensor.shape, dtype if tensor.is_floating_point() else tensor.dtype)}, dict
        )
        for name, tensor in network.state_dict().items()
    ]


@pytest.mark.slow
def test_the_bake_is_given_the_modules_that_it_imports_and_no_more() -> None:
    code = """
import sys
import builder.bake, builder.convert, builder.layers, builder.preview
print(*(name for name in sys.modules if name.partition(".")[0] in ("worker", "builder")))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    imported = {Path(*name.split(".")) for name in run.stdout.decode().split()}
    files = {
        str(path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py"))
        for path in imported
    }
    given = set(copied_from_here(STAGES["bake"]))
    assert given == {name for name in given if any(file.startswith(name) for file in files)}
    assert not [file for file in files if not file.startswith(tuple(given))]
