"""The guard against real packages that are really broken, each beside a control run without it."""

import concurrent.futures
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.import_guard import real_packages
from tests.import_guard.real_packages import Child, release, replace_in, run_python

pytestmark = [
    pytest.mark.packages,
    pytest.mark.skipif(torch.version.cuda is not None, reason="PyPI's CUDA builds may work here"),
]

USE = "from tests.import_guard.model_classes import print_facts; print_facts()"
GUARDED_USE = f"import worker; {USE}"


def guarded(*packages: Path, code: str = GUARDED_USE, **settings: str) -> Child:
    return run_python("-c", code, packages=packages, **settings)


def unguarded(*packages: Path, code: str = USE) -> Child:
    return run_python("-c", code, packages=packages)


def verdict(child: Any, name: str = "torchvision") -> Any:
    (facts,) = child.facts
    return facts["report"]["packages"][name]


def assert_runs_without_torchvision(child: Any) -> None:
    (facts,) = child.facts
    assert facts["report"]["packages"]["torchvision"]["status"] == "blocked"
    assert facts["report"]["image_processor_backend"] == "pil"
    assert facts["processor"] == "CLIPImageProcessorPil"
    assert facts["available"] is False
    assert facts["torchvision"].startswith("ModuleNotFoundError")


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    return real_packages.healthy_torchvision(tmp_path / "healthy")


# torchvision


def test_where_torchvision_is_absent_the_guard_does_and_says_nothing() -> None:
    child, control = guarded(), unguarded()

    assert verdict(child)["status"] == "absent"
    assert child.facts[0]["report"]["image_processor_backend"] == "pil"
    assert child.facts[0]["processor"] == control.facts[0]["processor"] == "CLIPImageProcessorPil"
    assert child.stderr == control.stderr


@pytest.mark.parametrize(
    ("version", "requires"),
    [("0.28.0", "torch==2.13.0"), ("0.24.1", "torch==2.9.1"), ("0.29.1", "torch>=2.14.0")],
)
def test_a_torchvision_whose_library_does_not_load_is_hidden(version: str, requires: str) -> None:
    broken = release("torchvision", version)

    control = unguarded(broken)
    child = guarded(broken)

    assert control.returncode != 0
    assert "operator torchvision::nms does not exist" in control.stderr
    assert_runs_without_torchvision(child)
    assert verdict(child)["version"] == version
    assert verdict(child)["requires"] == requires
    for part in (f"torchvision {version}", f"torch {torch.__version__}", requires):
        assert part in child.stderr
    assert "cannot open shared object file" in child.stderr  # the loader's words
    assert child.stderr.count("does not work") == 1


def test_a_swallowed_first_import_does_not_become_a_circular_import() -> None:
    broken = release("torchvision", "0.24.1")
    swallow = "try:\n    import torchvision\nexcept Exception:\n    pass\n"

    control = unguarded(broken, code=swallow + USE)
    child = guarded(broken, code=swallow + GUARDED_USE.replace("; ", "\n"))

    assert (
        "partially initialized module 'torchvision' has no attribute 'extension' "
        "(most likely due to a circular import)" in control.stderr
    )
    assert_runs_without_torchvision(child)
    assert "circular" not in child.stderr


def test_a_torchvision_that_imports_but_has_no_operators_is_hidden() -> None:
    broken = release("torchvision", "0.16.2")

    control = unguarded(broken)
    child = guarded(broken)

    assert "has no attribute 'grayscale_to_rgb'" in control.stderr
    assert_runs_without_torchvision(child)


def test_a_healthy_torchvision_is_left_alone(healthy: Path) -> None:
    child, control = guarded(healthy), unguarded(healthy)

    assert verdict(child)["status"] == "healthy"
    assert verdict(child)["version"].startswith("0.28.0")
    assert child.facts[0]["report"]["image_processor_backend"] == "torchvision"
    assert "TorchvisionBackend" in child.facts[0]["bases"]
    assert child.facts[0]["torchvision"] == "module with a Tensor"
    assert child.stderr == control.stderr


def test_version_numbers_that_disagree_do_not_condemn_a_working_torchvision(healthy: Path) -> None:
    (metadata,) = healthy.glob("torchvision-*.dist-info/METADATA")
    replace_in(metadata, "torch (==2.13.0)", "torch (>=2.14.0)")

    child = guarded(healthy)

    assert verdict(child)["status"] == "healthy"
    assert "TorchvisionBackend" in child.facts[0]["bases"]
    assert child.stderr == ""


def test_a_torchvision_whose_operators_are_registered_for_another_device_is_hidden(
    healthy: Path,
) -> None:
    replace_in(healthy / "torchvision/extension.py", '_nms, "CPU"', '_nms, "CUDA"')

    child = guarded(healthy)

    assert_runs_without_torchvision(child)
    assert "Could not run 'torchvision::nms' with arguments from the 'CPU' backend" in child.stderr


def test_a_torchvision_for_another_major_version_of_cuda_is_hidden(healthy: Path) -> None:
    words = "PyTorch and torchvision were compiled with different CUDA major versions"
    extension = healthy / "torchvision/extension.py"
    extension.write_text(f"{extension.read_text()}\nraise RuntimeError({words!r})\n")

    control = unguarded(healthy)
    child = guarded(healthy)

    assert control.returncode != 0
    assert words in control.stderr
    assert_runs_without_torchvision(child)
    assert words in child.stderr


def test_an_empty_directory_of_that_name_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()

    control = unguarded(tmp_path)
    child = guarded(tmp_path)

    assert control.returncode != 0
    assert_runs_without_torchvision(child)


def test_metadata_left_behind_is_not_a_torchvision(tmp_path: Path) -> None:
    (metadata,) = release("torchvision", "0.24.1").glob("*.dist-info")
    shutil.copytree(metadata, tmp_path / metadata.name)

    child = guarded(tmp_path)

    assert verdict(child)["status"] == "absent"
    assert child.facts[0]["available"] is False


def test_a_guard_that_comes_too_late_says_so(tmp_path: Path) -> None:
    broken = release("torchvision", "0.28.0")

    control = unguarded(broken, code=f"import transformers; {USE}")
    child = guarded(broken, code=f"import transformers; {GUARDED_USE}")

    assert control.returncode != 0
    assert child.returncode != 0
    assert (
        "ImportGuardError: Too late to hide torchvision: transformers came before" in child.stderr
    )


def test_requiring_health_stops_the_process_with_the_guards_own_words() -> None:
    child = guarded(release("torchvision", "0.28.0"), IMPORT_GUARD="require")

    assert child.returncode != 0
    assert "ImportGuardError: IMPORT_GUARD=require: torchvision 0.28.0 does not" in child.stderr


def test_the_guard_turned_off_leaves_the_fault_as_it_was() -> None:
    child = guarded(release("torchvision", "0.28.0"), IMPORT_GUARD="off")

    assert child.returncode != 0
    assert "operator torchvision::nms does not exist" in child.stderr


def test_the_error_that_stopped_an_inference_server_is_cured(tmp_path: Path) -> None:
    old = [
        release("transformers", "4.45.1"),
        release("diffusers", "0.33.0"),
        release("tokenizers", "0.20.3"),
        release("huggingface_hub", "0.36.0"),
        release("torchvision", "0.24.1"),
    ]
    swallow = "try:\n    import torchvision\nexcept Exception:\n    pass\n"
    load = "from diffusers.models import AutoencoderKL\nprint(AutoencoderKL.__name__)"

    control = unguarded(*old, code=swallow + load)
    child = guarded(*old, code=f"{swallow}import worker\n{load}")

    assert control.returncode != 0
    assert control.stderr.rstrip().endswith(
        "RuntimeError: Failed to import diffusers.models.autoencoders.autoencoder_kl because of "
        "the following error (look up to see its traceback):\n"
        "Failed to import diffusers.loaders.single_file_model because of the following error "
        "(look up to see its traceback):\n"
        "Failed to import transformers.models.auto.image_processing_auto because of the following "
        "error (look up to see its traceback):\n"
        "partially initialized module 'torchvision' has no attribute 'extension' "
        "(most likely due to a circular import)"
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "AutoencoderKL"


# Its siblings


def test_a_torchaudio_whose_library_does_not_load_is_hidden() -> None:
    broken = release("torchaudio", "2.11.0")

    control = unguarded(broken)
    child = guarded(broken)

    assert control.returncode != 0
    assert "_torchaudio.abi3.so" in control.stderr
    assert verdict(child, "torchaudio")["status"] == "blocked"
    assert "torchaudio 2.11.0 does not work" in child.stderr


def test_a_healthy_torchaudio_is_left_alone(tmp_path: Path) -> None:
    child = guarded(real_packages.healthy_torchaudio(tmp_path))

    assert verdict(child, "torchaudio")["status"] == "healthy"
    assert "does not work" not in child.stderr


def test_an_xformers_whose_library_does_not_load_is_hidden() -> None:
    broken = release("xformers", "0.0.33.post2")

    control = unguarded(broken)
    child = guarded(broken)

    assert control.returncode != 0
    assert "libcudart.so.12: cannot open shared object file" in control.stderr
    assert verdict(child, "xformers")["status"] == "blocked"
    assert "xformers 0.0.33.post2 does not work" in child.stderr
    assert "torch==2.9.1" in child.stderr


def test_all_three_broken_at_once_are_hidden() -> None:
    child = guarded(
        release("torchvision", "0.24.1"),
        release("torchaudio", "2.11.0"),
        release("xformers", "0.0.33.post2"),
    )

    assert_runs_without_torchvision(child)
    packages = child.facts[0]["report"]["packages"]
    assert {package["status"] for package in packages.values()} == {"blocked"}
    assert child.stderr.count("does not work") == 3


# Processes. "main" as the control: what the first process did does not help the ones it starts.


def launch(
    way: str, guard: Any, command: Any = ("tests/import_guard/process_launcher.py",)
) -> Child:
    broken = release("torchvision", "0.28.0")
    return run_python(*command, way, packages=(broken,), GUARD=guard)


@pytest.mark.parametrize(
    ("way", "guard_of_the_control", "num_processes"),
    [
        ("main", "nowhere", 1),
        ("fork", "nowhere", 1),
        ("spawn", "main", 1),
        ("forkserver", "main", 1),
        ("pool", "main", 2),
    ],
)
def test_every_process_is_guarded(way: str, guard_of_the_control: str, num_processes: int) -> None:
    control = launch(way, guard_of_the_control)
    child = launch(way, "package")

    assert control.returncode != 0
    assert "operator torchvision::nms does not exist" in control.stderr
    assert [facts["processor"] for facts in child.facts] == [
        "CLIPImageProcessorPil"
    ] * num_processes


def test_every_process_of_torchrun_is_guarded() -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (*torchrun, "tests/import_guard/process_launcher.py")

    control = launch("main", "nowhere", command)
    child = launch("main", "package", command)

    assert control.returncode != 0
    assert [facts["processor"] for facts in child.facts] == ["CLIPImageProcessorPil"] * 2


@pytest.mark.parametrize(("guard", "outcome"), [("package", "fine"), ("main", "RuntimeError: ")])
def test_both_workers_of_uvicorn_are_guarded(guard: str, outcome: str) -> None:
    answers = answers_of_uvicorn(guard)

    assert len(answers) == 2
    assert all(answer.startswith(outcome) for answer in answers.values()), answers


def answers_of_uvicorn(guard: str) -> dict[int, str]:
    """What each of two server processes answers, by its id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "tests/import_guard/process_launcher.py", "uvicorn"],
        env=real_packages.environment(
            release("torchvision", "0.28.0"), GUARD=guard, PORT=str(port)
        ),
        cwd=real_packages.REPOSITORY,
        stderr=subprocess.DEVNULL,
    )

    def ask(_: int) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
            return json.load(answer)

    answers: dict[Any, Any] = {}
    deadline = time.monotonic() + 120
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as clients:
            while len(answers) < 2 and time.monotonic() < deadline:
                for asked in [clients.submit(ask, number) for number in range(4)]:
                    if asked.exception() is None:
                        answers[asked.result()["process"]] = asked.result()["outcome"]
                time.sleep(0.2)
    finally:
        server.terminate()
        server.wait(30)
    return answers
