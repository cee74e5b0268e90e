"""What the documents and comments name is there, and what is said twice agrees."""

import re
import tomllib
from pathlib import Path

import pytest

from avatar_client.version import __version__
from worker.settings import Settings

ROOT = Path(__file__).parents[1]
FOLDERS = [
    *("avatar_client", "benchmarks", "builder", "demo", "docs", "local_endpoint", "studio"),
    *("tests", "training", "worker"),
]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("tests/**/*.md")]
DOCUMENTS += [ROOT / "worker/demo_model/README.md", ROOT / "training/model_card.md"]
SOURCES = [source for folder in FOLDERS for source in (ROOT / folder).rglob("*.py")]
OTHERS = [ROOT / "handler.py", ROOT / "Dockerfile", ROOT / "Makefile", ROOT / "pyproject.toml"]

PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
COMMAND = re.compile(r"\bpython -m ([\w.]+)")
NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`")
# Commands of others, and what is made first.
FOREIGN_MODULES = {"pytest", "venv", "pip"}
MADE = {"worker/demo_model.part"}


def _exists(path: str) -> bool:
    return (ROOT / path).exists() or (ROOT / f"{path}.py").exists() or path in MADE


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("file", [*DOCUMENTS, *OTHERS, *SOURCES], ids=_relative)
def test_every_path_and_command_named_is_there(file: Path) -> None:
    text = file.read_text()
    named = {path for path in PATH.findall(text) if not _exists(path)}
    for module in COMMAND.findall(text):
        if module.split(".")[0] not in FOREIGN_MODULES:
            path = module.rstrip(".").replace(".", "/")
            named |= set() if _exists(path) else {module}
    assert not named


@pytest.mark.parametrize("document", DOCUMENTS, ids=_relative)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert not [
        link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()
    ]


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name in ("ARCHITECTURE.md", "CONTRIBUTING.md")]
    + sorted((ROOT / "docs").rglob("*.md")),
    ids=_relative,
)
def test_every_name_in_code_s_letters_is_in_the_code(document: Path) -> None:
    words = set(re.findall(r"\w+", "".join(path.read_text() for path in [*SOURCES, *OTHERS])))
    words |= {name.upper() for name in Settings.model_fields}  # as the environment has them
    named = {name for name in NAME.findall(document.read_text()) if re.search("[A-Z_.]", name)}
    assert not {name for name in named if not set(name.split(".")) <= words}


@pytest.mark.parametrize("package", sorted((ROOT / "worker").glob("*/__init__.py")), ids=_relative)
def test_the_map_names_every_module_of_the_worker(package: Path) -> None:
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    entry = re.split(r"\n(?=\S)", tree.partition(f"{_relative(package.parent)}/")[2])[0]
    modules = {path.stem for path in package.parent.glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"\w+", entry))


def test_every_fault_of_the_table_has_a_test() -> None:
    cells = [
        line.strip("| ").split(" | ")
        for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith(("| Case |", "| --- |", "| | |"))
    ]
    rows = [row for row in cells if len(row) != 2]  # those of two are figures
    assert len(rows) > 30
    for case, worker, client, named in rows:
        assert all((case, worker, client))
        [(path, name)] = re.findall(r"^`(tests/[\w/]+\.py)::(test_\w+)`$", named)
        defined = re.findall(r"^(?:async )?def (\w+)\(", (ROOT / path).read_text(), re.MULTILINE)
        assert name in defined, named


def test_the_version_is_the_same_wherever_it_stands() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    source = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert source == "avatar_client.version.__version__"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    assert f"avatar:{__version__} " in (ROOT / "README.md").read_text()


def test_before_a_commit_a_push_and_by_hand_the_same_is_checked_as_in_ci() -> None:
    lines = re.findall(r"^make ([^#\n]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    words = {word for line in lines for word in line.split()}
    in_ci = {word for word in words if word[0] not in "-." and "=" not in word}
    by_hooks = re.findall(
        r"entry: make ([\w ]+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE
    )
    parts = {"lint", "types", "unit"}  # of `make test`
    assert parts <= set(by_hooks)
    assert in_ci - {"test"} == set(by_hooks) - parts
