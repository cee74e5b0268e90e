"""The doctor, on checks written for the test and on the worker itself."""

import json
from pathlib import Path

import pytest

from tests.conftest import BucketServer
from tests.import_guard.real_packages import run_python
from worker import doctor
from worker.doctor import Check, Finding, examine, page_entry


def raise_a_chain() -> str:
    try:
        raise OSError("libcudart.so.12: cannot open shared object file")
    except OSError as error:
        raise ModuleNotFoundError("Could not import module 'CLIPTextModel'") from error


def test_a_failure_is_named_by_its_root_cause_and_place() -> None:
    finding = examine(Check("transformers", raise_a_chain))

    assert finding.state == "failed"
    assert finding.text == "OSError: libcudart.so.12: cannot open shared object file"
    assert finding.where is not None
    assert finding.where.startswith(f"{__file__}:")
    assert finding.chain == (
        "ModuleNotFoundError: Could not import module 'CLIPTextModel'",
        finding.text,
    )


def test_the_page_shows_a_failure_as_its_cause_its_place_and_what_people_see() -> None:
    entry = page_entry(examine(Check("transformers", raise_a_chain)))

    state, place, seen_as = entry.splitlines()
    assert state.startswith("failed  transformers ")
    assert state.endswith("OSError: libcudart.so.12: cannot open shared object file")
    assert place.strip().startswith(f"at {__file__}:")
    assert seen_as.strip() == "seen as ModuleNotFoundError: Could not import module 'CLIPTextModel'"


def test_the_place_of_a_failure_stays_in_one_line_however_long_its_path_is() -> None:
    path = f"{'/a long path' * 20}/worker.py:7"
    finding = Finding(name="torch", state="failed", text="OSError: broken", where=path)

    assert page_entry(finding).splitlines()[1] == f"          at {path}"


def test_a_part_that_this_installation_leaves_out_is_skipped() -> None:
    def leave_out() -> str:
        raise doctor.NotApplicableError("local_endpoint is not part of this installation")

    finding = examine(Check("local endpoint", leave_out))

    assert (finding.state, finding.text) == (
        "skipped",
        "local_endpoint is not part of this installation",
    )


def test_a_long_finding_stays_within_a_terminal() -> None:
    words = "\n".join(["a finding of many words " * 20] * 2)

    entry = page_entry(examine(Check("torch", lambda: words)))

    assert max(map(len, entry.splitlines())) <= 100
    assert entry.startswith("ok      torch ")


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torchvision.extension\n"
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (package / "extension.py").touch()
    return tmp_path


def test_every_link_holds_with_a_broken_torchvision_in_the_environment(
    broken_torchvision: Path,
) -> None:
    child = run_python(
        "-m", "worker", "doctor", "--imports", "--json", packages=(broken_torchvision,)
    )

    facts = json.loads(child.stdout)
    assert {
        check["name"]: check["text"] for check in facts["checks"] if check["state"] != "ok"
    } == {}
    assert [check["name"] for check in facts["checks"]] == [check.name for check in doctor.IMPORTS]
    assert facts["imports"]["packages"]["torchvision"]["status"] == "blocked"
    assert (facts["ok"], child.returncode) == (True, 0)


@pytest.mark.slow
def test_with_the_guard_off_each_broken_link_names_torchvision(broken_torchvision: Path) -> None:
    child = run_python(
        "-m", "worker", "doctor", "--imports", packages=(broken_torchvision,), IMPORT_GUARD="off"
    )

    failed = [line for line in child.stdout.splitlines() if line.startswith("failed")]
    assert child.returncode == 1
    assert [line[8:24].strip() for line in failed][:3] == [
        "image processors",
        "transformers",
        "diffusers",
    ]
    for line in failed[:3]:
        assert line.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert "Broken: image processors, transformers, diffusers" in child.stdout


def findings(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, tuple[str, str]]:
    """What the checks of the machine come to, with these settings."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = [examine(check) for check in doctor.MACHINE]
    return {finding.name: (finding.state, finding.text) for finding in found}


def test_a_demo_worker_needs_neither_a_gpu_nor_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, AVATAR_MODEL="demo")

    states = {name: state for name, (state, _) in found.items()}
    assert states == {
        "settings": "ok",
        "GPU": "skipped",
        "weights": "skipped",
        "memory plan": "skipped",
        "disk speed": "skipped",
        "encoders": "ok",
        "provenance": "skipped",
        "storage": "skipped",
        "uptime": "ok",
    }


def test_a_model_that_is_cut_short_is_named_by_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")

    state, text = findings(monkeypatch, MODEL_DIR=str(tmp_path))["weights"]

    assert state == "failed"
    assert "vae/model.safetensors" in text


def test_a_bucket_that_refuses_the_keys_is_told_without_them(
    monkeypatch: pytest.MonkeyPatch, object_store: BucketServer
) -> None:
    environment = object_store.environment | {"BUCKET_NAME": "no-such-bucket"}

    state, text = findings(monkeypatch, **environment)["storage"]

    assert state == "failed"
    assert "NoSuchBucket" in text
    assert environment["BUCKET_SECRET_ACCESS_KEY"] not in text
