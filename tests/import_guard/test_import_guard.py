"""The guard's rules, in fresh processes with packages written for the test."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.import_guard.real_packages import Child, run_python
from worker import import_guard

REPORT = """
import json
from worker import import_guard
def show(report=None):
    print(json.dumps((report or import_guard.report()).as_dict()))
"""
BROKEN = "import torchvision.extension\nraise RuntimeError('operator torchvision::nms is missing')"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An installation with nothing but a torch, which is enough where nothing is computed."""
    install(tmp_path, "torch", "__version__ = '2.13.0'")
    return tmp_path


def install(site: Path, name: str, code: str, **modules: str) -> None:
    """Writes a package, its submodules and nothing else."""
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(code)
    for module, text in modules.items():
        (site / name / f"{module}.py").write_text(text)


def install_broken_torchvision(site: Path) -> None:
    install(site, "torchvision", BROKEN, extension="")


def python(site: Path, code: str, **settings: str) -> Child:
    """Runs the code where only `site` and the standard library are installed (-S)."""
    return run_python("-S", "-c", REPORT + textwrap.dedent(code), packages=(site,), **settings)


def torchvision(child: Child) -> Any:
    return child.facts[-1]["packages"]["torchvision"]


# What is found


def test_importing_the_package_imports_nothing_but_the_standard_library(site: Path) -> None:
    child = python(
        site,
        """
        import sys
        from worker import import_guard
        roots = {name.partition(".")[0] for name in sys.modules}
        print(json.dumps(sorted(roots - set(sys.stdlib_module_names) - {"worker", "__main__"})))
        """,
    )

    [report] = child.facts
    assert not report


def test_absent_packages_cost_no_torch_and_no_words(site: Path) -> None:
    child = python(
        site, "show(import_guard.ensure())\nimport sys\nassert 'torch' not in sys.modules"
    )

    assert {package["status"] for package in child.facts[0]["packages"].values()} == {"absent"}
    assert child.stderr == ""


def test_a_broken_package_becomes_not_installed_for_the_whole_process(site: Path) -> None:
    install_broken_torchvision(site)

    child = python(
        site,
        """
        show(import_guard.ensure())
        import importlib.util, sys
        assert importlib.util.find_spec("torchvision") is None
        assert "torchvision.extension" not in sys.modules
        try:
            import torchvision.transforms
        except ModuleNotFoundError as error:
            assert error.name.startswith("torchvision")
        else:
            raise AssertionError("it was imported")
        """,
    )

    assert torchvision(child)["status"] == "blocked"
    assert torchvision(child)["error"] == "RuntimeError: operator torchvision::nms is missing"
    assert child.facts[0]["image_processor_backend"] == "pil"
    assert child.stderr.startswith("torchvision of unknown version does not work with torch 2.13.0")


def test_the_warning_and_the_report_name_both_versions_and_the_bottom_of_the_chain(
    site: Path,
) -> None:
    code = """
    try:
        raise OSError("libcudart.so.12: cannot open shared object file")
    except OSError as error:
        raise RuntimeError("could not load") from error
    """
    install(site, "torchvision", textwrap.dedent(code))
    metadata = site / "torchvision-0.24.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.24.1\n"
        "Requires-Dist: numpy\nRequires-Dist: torch-extras\n"
        "Requires-Dist: torch (==2.9.1) ; python_version > '3'\n"
    )

    child = python(site, "show(import_guard.ensure())")

    found = torchvision(child)
    assert (found["version"], found["torch"]) == ("0.24.1", "2.13.0")
    assert found["requires"] == "torch==2.9.1"
    assert found["error"] == "OSError: libcudart.so.12: cannot open shared object file"
    for part in (
        "torchvision 0.24.1",
        "torch 2.13.0",
        "torch==2.9.1",
        found["error"],
        "pip uninstall",
    ):
        assert part in child.stderr
    assert len(child.stderr.splitlines()) == 1


def test_a_library_that_does_not_load_is_found_before_the_package_is_run(site: Path) -> None:
    install(site, "torchvision", "raise SystemExit('it was run')")
    (site / "torchvision" / "_C.so").write_bytes(b"no library")

    child = python(site, "show(import_guard.ensure())")

    assert torchvision(child)["status"] == "blocked"
    assert torchvision(child)["error"].startswith("OSError: ")
    assert "_C.so" in torchvision(child)["error"]


def test_a_first_import_that_failed_and_was_swallowed_does_not_hide_the_cause(site: Path) -> None:
    code = """
    import sys
    if "torchvision.extension" in sys.modules:
        raise AttributeError("partially initialized module 'torchvision'")
    """
    install(site, "torchvision", textwrap.dedent(code) + BROKEN, extension="")

    child = python(
        site,
        """
        try:
            import torchvision
        except RuntimeError:
            pass
        show(import_guard.ensure())
        """,
    )

    assert torchvision(child)["error"] == "RuntimeError: operator torchvision::nms is missing"


def test_without_torch_nothing_is_hidden(tmp_path: Path) -> None:
    install_broken_torchvision(tmp_path)

    child = python(tmp_path, "show(import_guard.ensure())")

    assert torchvision(child)["status"] == "no-torch"


def test_a_torch_that_cannot_be_imported_is_the_error_itself(tmp_path: Path) -> None:
    install(tmp_path, "torch", "raise OSError('libtorch_cpu.so: cannot open')")
    install_broken_torchvision(tmp_path)

    child = python(tmp_path, "import_guard.ensure()")

    assert child.stderr.rstrip().endswith("OSError: libtorch_cpu.so: cannot open")


def test_a_package_is_run_once_however_many_threads_ask(site: Path) -> None:
    install(site, "torchvision", "import time\ntime.sleep(0.2)\nprint('{}')\nraise RuntimeError()")

    child = python(
        site,
        """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(import_guard.ensure) for _ in range(8)]:
                assert future.result().packages["torchvision"].status == "blocked"
        import_guard.ensure()
        """,
    )

    assert child.facts == [{}]
    assert child.stderr.count("does not work") == 1


def test_a_verdict_stands_with_its_reasons(site: Path) -> None:
    install_broken_torchvision(site)

    child = python(site, "show(import_guard.ensure())\nshow(import_guard.ensure(policy='off'))")

    first, second = child.facts
    assert first["packages"]["torchvision"]["error"]
    assert second == first


def test_a_package_that_imports_transformers_while_it_is_examined_does_not_lock_up(
    site: Path,
) -> None:
    install(site, "transformers", "")
    install(site, "flash_attn", "import transformers\n__version__ = '2.8'")

    child = python(site, "show(import_guard.ensure(('flash_attn',)))")

    assert child.facts[0]["packages"]["flash_attn"]["status"] == "healthy"
    assert child.facts[0]["packages"]["flash_attn"]["version"] == "2.8"


# When it is examined


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_library_already_finds_the_broken_package_gone_when_it_is_imported(
    site: Path, library: str
) -> None:
    install_broken_torchvision(site)
    install(site, library, "import importlib.util\nfound = importlib.util.find_spec('torchvision')")

    child = python(
        site,
        f"""
        show()
        import {library}
        assert {library}.found is None
        show()
        """,
    )

    before, after = child.facts
    assert before["packages"]["torchvision"]["status"] == "unguarded"
    assert after["packages"]["torchvision"]["status"] == "blocked"


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_child_process_is_guarded_however_it_was_started(site: Path, method: str) -> None:
    install_broken_torchvision(site)
    install(site, "transformers", "")
    (site / "launcher.py").write_text(
        f"""
import multiprocessing
import worker
def child():
    import transformers
    from worker import import_guard
    assert import_guard.status("torchvision") == "blocked"
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=child)
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""
    )

    child = run_python("-S", str(site / "launcher.py"), packages=(site,))

    assert child.returncode == 0, child.stderr
    assert child.stderr.count("does not work") == 1


@pytest.mark.parametrize("policy", ["auto", "block"])
def test_a_guard_that_comes_after_its_libraries_is_an_error(site: Path, policy: str) -> None:
    install_broken_torchvision(site)
    install(site, "transformers", "")
    code = "import transformers\nimport worker"

    child = run_python("-S", "-c", code, packages=(site,), IMPORT_GUARD=policy)

    assert child.returncode != 0
    assert "Too late to hide torchvision: transformers came before the guard" in child.stderr


def test_a_guard_that_comes_late_with_nothing_to_hide_is_no_error(site: Path) -> None:
    install(site, "transformers", "")

    child = run_python("-S", "-c", "import transformers\nimport worker", packages=(site,))

    assert (child.returncode, child.stderr) == (0, "")


def test_importing_the_handler_imports_no_torch(tmp_path: Path) -> None:
    install_broken_torchvision(tmp_path)
    code = "import handler, json, sys; print(json.dumps(sorted(sys.modules)))"

    child = run_python("-c", code, packages=(tmp_path,))

    (modules,) = child.facts
    assert {"worker.import_guard", "handler"} <= set(modules)
    assert not {"torch", "torchvision", "transformers", "diffusers"} & set(modules)


# The operator's setting


def test_block_hides_a_package_without_running_it(site: Path) -> None:
    install(site, "torchvision", "raise SystemExit('it was run')")

    child = python(
        site,
        "show(import_guard.ensure())\nimport sys\nassert 'torch' not in sys.modules",
        IMPORT_GUARD="block",
    )

    assert torchvision(child)["status"] == "blocked"
    assert torchvision(child)["policy"] == "block"
    assert child.stderr == ""


def test_off_leaves_the_package_where_it_is(site: Path) -> None:
    install_broken_torchvision(site)

    child = python(
        site,
        """
        show(import_guard.ensure())
        import importlib.util
        assert importlib.util.find_spec("torchvision") is not None
        """,
        IMPORT_GUARD="off",
    )

    assert torchvision(child)["status"] == "unguarded"
    assert child.facts[0]["image_processor_backend"] == "torchvision"


def test_require_refuses_a_broken_package(site: Path) -> None:
    install_broken_torchvision(site)
    install(site, "transformers", "")

    asked = python(site, "import_guard.ensure()", IMPORT_GUARD="require")
    by_the_import = python(site, "import transformers", IMPORT_GUARD="require")

    for child in (asked, by_the_import):
        assert child.returncode != 0
        assert "ImportGuardError: IMPORT_GUARD=require: torchvision of unknown" in child.stderr


def test_require_accepts_an_absent_package(site: Path) -> None:
    child = python(site, "show(import_guard.ensure(policy='require'))")

    assert torchvision(child)["status"] == "absent"


def test_an_empty_setting_is_the_default(site: Path) -> None:
    child = python(site, "show(import_guard.ensure())", IMPORT_GUARD="")

    assert torchvision(child)["policy"] == "auto"


def test_an_unknown_policy_is_refused_with_the_known_ones(site: Path) -> None:
    child = python(site, "import_guard.ensure()", IMPORT_GUARD="on")

    assert child.returncode != 0
    assert child.stderr.rstrip().endswith(
        "IMPORT_GUARD is 'on'; it must be one of auto, block, require, off"
    )


# Health, with the real torch: an answer, not an import


def examined(site: Path, before: str = "") -> Child:
    return run_python("-c", f"{REPORT}{before}\nshow(import_guard.ensure())", packages=(site,))


@pytest.mark.parametrize(
    ("kept", "status"), [("[0, 2]", "healthy"), ("[0, 1, 2]", "blocked"), ("[]", "blocked")]
)
def test_torchvision_is_healthy_if_its_operator_answers_right(
    tmp_path: Path, kept: str, status: str
) -> None:
    ops = f"import torch\ndef nms(boxes, scores, iou_threshold):\n    return torch.tensor({kept})"
    install(tmp_path, "torchvision", "__version__ = '0.28.0'", ops=ops)

    child = examined(tmp_path)

    assert torchvision(child)["status"] == status
    assert child.facts[0]["image_processor_backend"] == (
        "torchvision" if status == "healthy" else "pil"
    )


def test_a_mock_in_torchvisions_place_is_not_healthy(tmp_path: Path) -> None:
    mock = "import sys, unittest.mock\nsys.modules['torchvision'] = unittest.mock.MagicMock()"
    install_broken_torchvision(tmp_path)

    child = examined(tmp_path, before=mock)

    assert torchvision(child)["status"] == "blocked"


@pytest.mark.parametrize(
    ("heard", "status"), [("[1, .5, .25]", "healthy"), ("[1, 0, 0]", "blocked")]
)
def test_torchaudio_is_healthy_if_its_operator_answers_right(
    tmp_path: Path, heard: str, status: str
) -> None:
    functional = f"import torch\ndef lfilter(*filter):\n    return torch.tensor({heard})"
    install(tmp_path, "torchaudio", "", functional=functional)

    child = examined(tmp_path)

    assert child.facts[0]["packages"]["torchaudio"]["status"] == status


@pytest.mark.parametrize(
    ("failure", "status"), [("None", "healthy"), ("OSError('libcudart.so.12')", "blocked")]
)
def test_xformers_is_healthy_if_its_library_loaded(
    tmp_path: Path, failure: str, status: str
) -> None:
    install(tmp_path, "xformers", "", ops="", _cpp_lib=f"_cpp_library_load_exception = {failure}")

    child = examined(tmp_path)

    assert child.facts[0]["packages"]["xformers"]["status"] == status


# What it tells


def test_the_report_names_the_image_processors_that_transformers_uses_here() -> None:
    from transformers.utils import is_torchvision_available

    backend = import_guard.ensure().image_processor_backend

    assert backend == ("torchvision" if is_torchvision_available() else "pil")


def test_what_a_client_sees_of_the_report_is_short_and_holds_no_path(site: Path) -> None:
    install_broken_torchvision(site)

    child = python(site, "print(json.dumps(import_guard.ensure().brief()))")

    assert child.facts == [
        {
            "torchvision": "blocked",
            "torchaudio": "absent",
            "xformers": "absent",
            "image_processor_backend": "pil",
        }
    ]


def test_a_chain_of_exceptions_ends_with_its_root_cause() -> None:
    try:
        try:
            try:
                raise KeyError("root")
            except KeyError as error:
                raise ValueError("middle") from error
        except ValueError:
            raise RuntimeError("top")  # noqa: B904 - implicit, as libraries do it
    except RuntimeError as error:
        chain = import_guard.exception_chain(error)

    assert [str(link).strip("'") for link in chain] == ["top", "middle", "root"]


ENTRIES = ["handler", "worker.__main__", "local_endpoint.__main__"]
ENTRIES += ["demo.__main__", "builder.bake", "builder.convert", "builder.download"]
ENTRIES += ["builder.verify", "benchmarks.generation", "benchmarks.loading"]
ENTRIES += ["benchmarks.decode", "benchmarks.several_gpus", "worker.multi_gpu.rank_process"]
ENTRIES += ["training.__main__", "training.audio_encoder"]
WATCH = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "torchvision", "transformers", "diffusers"):
            assert "worker.import_guard" in sys.modules, name + " came before the guard"
            print(name, "after the guard", flush=True)
            os._exit(0)  # the rest of it comes later still

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
import torch
"""


@pytest.mark.parametrize("entry", ENTRIES)
def test_whatever_is_started_passes_the_guard_before_torch(entry: str) -> None:
    root = Path(__file__).parents[2]

    done = subprocess.run(
        [sys.executable, "-c", WATCH, entry], cwd=root, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("after the guard\n")
