"""Keeps a broken torchvision, torchaudio or xformers from stopping this process.

transformers and diffusers import these packages as soon as they find them. One that is there but
does not work (built for another torch, as a rule) then takes CLIPTextModel, the VAE and the rest
down with it, under an error that names none of the causes. The guard runs each package it finds
before transformers and diffusers look for it, and makes a broken one "not installed" for the whole
process, `sys.modules[name] = None`: each library takes its own path without it, and code that asks
for it gets an honest ModuleNotFoundError. A healthy one is left alone. docs/imports.md tells the
story; the pipeline itself needs none of the three.

How entry points use it:

- `worker/__init__.py` calls `arm()`, so every process that imports anything of ours is covered
  however it was started (spawn, forkserver, torchrun, a uvicorn worker). Arming imports nothing:
  the packages are examined when transformers or diffusers is first looked for. The heartbeat
  process, which re-imports handler.py and touches neither, never imports torch.
- `handler.py` imports from `worker` before any other package, and its `main()` calls `ensure()`
  before it loads a model: the verdict is in the log and in `report()` from the start.
- A program that imports transformers or diffusers before it imports `worker` is too late: both have
  already decided what is installed. Then a broken package raises ImportGuardError.

The operator's setting is IMPORT_GUARD:

    auto     run each package, hide the broken ones (default)
    block    hide them unexamined: cheapest, and the same image processors everywhere
    require  raise if one is installed and broken: for image builds and CI
    off      do nothing
"""

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any, Literal, cast, get_args

Policy = Literal["auto", "block", "require", "off"]
Status = Literal["healthy", "absent", "blocked", "unguarded", "no-torch"]

GUARDED = ("torchvision", "torchaudio", "xformers")
LIBRARIES = ("transformers", "diffusers")  # what looks for them, once, as it is imported

logger = logging.getLogger(__name__)


class ImportGuardError(RuntimeError):
    """A broken package that could not be hidden, or must not be there.

    Not an ImportError: libraries swallow those when they ask whether transformers is there.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What the guard found and did about one package."""

    name: str
    status: Status
    policy: Policy | None = None  # that it was examined under; None: not examined yet
    version: str | None = None
    torch: str | None = None  # the version in this process
    requires: str | None = None  # the torch that the package's metadata asks for, if it is broken
    error: str | None = None  # why it is broken, from the bottom of the exception chain
    milliseconds: float = 0.0  # that the examination took, beyond importing torch

    def fault(self) -> str:
        """One line: what is broken, next to which torch, why, and how to mend it."""
        requires = f" (its metadata asks for {self.requires})" if self.requires else ""
        return (
            f"{self.name} {self.version or 'of unknown version'} does not work with torch "
            f"{self.torch}{requires}: {self.error}. To mend it: pip uninstall {self.name}, "
            "which this worker does not need, or install the release made for this torch. "
            "See docs/imports.md."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the guard knows about this process."""

    packages: dict[str, Package]
    image_processor_backend: Literal["torchvision", "pil"]  # transformers' choice in this process

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, for the operator: an error may name a path."""
        return asdict(self)

    def brief(self) -> dict[str, str]:
        """Each package's status and the image processors' backend, for a job's result."""
        statuses: dict[str, str] = {name: found.status for name, found in self.packages.items()}
        return statuses | {"image_processor_backend": self.image_processor_backend}


class _Hook:
    """A finder that finds nothing: it has the packages examined before their users are imported."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        # Never for a guarded package: running one from inside the search for it imports it twice.
        if name in LIBRARIES:
            ensure()


_lock = threading.Lock()
_examining: int | None = None  # the thread that holds the lock; what it imports may come back here
_verdicts: dict[str, Package] = {}


def arm() -> None:
    """Has the packages examined just before transformers or diffusers is first imported.

    Raises:
        ImportGuardError: that is too late already; see `ensure`.
    """
    if _Hook not in sys.meta_path:
        sys.meta_path.insert(0, _Hook)
    if _imported_libraries():
        ensure()


def ensure(names: tuple[str, ...] = GUARDED, policy: Policy | None = None) -> Report:
    """The report, once each of `names` was examined in this process and hidden if it is broken.

    The policy is IMPORT_GUARD's unless it is given. A verdict stands for the life of the process.

    Raises:
        ImportGuardError: a package is broken, and transformers or diffusers, imported already,
            counts on it; or a package is broken, and the policy is "require".
        ValueError: there is no such policy.
    """
    global _examining
    if _examining == threading.get_ident():
        return report()
    # Read here and not in settings.py, which needs pydantic: this runs before any other package.
    set_one = os.environ.get("IMPORT_GUARD", "").strip().lower()  # noqa: TID251
    chosen = _checked(policy or set_one or "auto")
    with _lock:
        _examining = threading.get_ident()
        try:
            for name in names:
                if name not in _verdicts or _verdicts[name].status == "unguarded":
                    _verdicts[name] = _examine(name, chosen)
        finally:
            _examining = None
    _refuse([_verdicts[name] for name in names], chosen)
    return report()


def report() -> Report:
    """What is known so far. It examines nothing: a package not examined yet is "unguarded"."""
    unexamined = {name: Package(name=name, status="unguarded") for name in GUARDED}
    return Report(
        packages=unexamined | _verdicts,
        # transformers 5 picks the torchvision image processors exactly if it finds torchvision.
        image_processor_backend="torchvision" if _is_installed("torchvision") else "pil",
    )


def status(name: str) -> Status:
    """The package's status so far."""
    return report().packages[name].status


def exception_chain(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on down to the root cause, which comes last."""
    chain = [error]
    while below := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        chain.append(error := below)
    return chain


def forget_leftovers() -> None:
    """Clears what imports of guarded packages that failed and were swallowed have left behind.

    torchvision's submodules stay, and because of them its next import says "partially initialized
    module ... circular import" in place of what is wrong.
    """
    for name in GUARDED:
        if name not in sys.modules:
            _forget(name)


def _checked(policy: str) -> Policy:
    known = get_args(Policy)
    if policy not in known:
        raise ValueError(f"IMPORT_GUARD is {policy!r}; it must be one of {', '.join(known)}")
    return cast(Policy, policy)


def _imported_libraries() -> list[str]:
    return [library for library in LIBRARIES if library in sys.modules]


def _is_installed(name: str) -> bool:
    return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None


def _examine(name: str, policy: Policy) -> Package:
    """The verdict on one package, carried out."""
    forget_leftovers()
    if name in sys.modules and sys.modules[name] is None:
        return Package(name=name, status="blocked", policy=policy)
    if not _is_installed(name):
        return Package(name=name, status="absent", policy=policy)
    if policy == "off":
        return Package(name=name, status="unguarded", policy=policy)
    if policy == "block":
        return _hide(Package(name=name, status="blocked", policy=policy))
    if not _is_installed("torch"):
        return Package(name=name, status="no-torch", policy=policy)
    torch = import_module("torch")  # if it fails, that is the error: nothing here works without it
    started = time.perf_counter()
    found = Package(name=name, status="healthy", policy=policy, torch=str(torch.__version__))
    try:
        _PROBES.get(name, _import)(name)
    except Exception as error:
        found = _hide(_diagnosed(found, error))
    else:
        found = replace(found, version=getattr(sys.modules[name], "__version__", None))
    return replace(found, milliseconds=round((time.perf_counter() - started) * 1000, 1))


def _hide(package: Package) -> Package:
    """The package, made "not installed"; "unguarded" if its users already believe it is there."""
    if _imported_libraries():
        return replace(package, status="unguarded")
    _forget(package.name)
    sys.modules[package.name] = None  # type: ignore[assignment]  # typeshed knows modules only
    if package.error:
        logger.warning("%s Until then it is hidden from this process.", package.fault())
    else:
        logger.info("%s is hidden from this process by IMPORT_GUARD=block.", package.name)
    return replace(package, status="blocked")


def _forget(name: str) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def _refuse(packages: list[Package], policy: Policy) -> None:
    faults = " ".join(package.fault() for package in packages if package.error)
    exposed = [package.name for package in packages if package.status == "unguarded"]
    if exposed and policy != "off":
        raise ImportGuardError(
            f"Too late to hide {', '.join(exposed)}: {' and '.join(_imported_libraries())} came "
            f"before the guard in this process. Import worker first. {faults}".strip()
        )
    if faults and policy == "require":
        raise ImportGuardError(f"IMPORT_GUARD=require: {faults}")


def _diagnosed(package: Package, error: Exception) -> Package:
    """The package with what is known of its fault. Metadata explains a fault; it proves none."""
    root = exception_chain(error)[-1]
    first_line = (str(root).splitlines() or [""])[0]
    try:
        version = importlib.metadata.version(package.name)
        requirements = importlib.metadata.requires(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        version, requirements = None, []
    of_torch = [re.sub(r"[ ()]|;.*", "", text) for text in requirements]
    return replace(
        package,
        version=version,
        requires=next((text for text in of_torch if re.match(r"torch[=<>~!]", text)), None),
        error=f"{type(root).__name__}: {first_line[:300]}",
    )


def _load_library(package: str, *names: str) -> None:
    """Loads the package's compiled library, the first of `names` that it has.

    Before the package itself is imported: torchvision keeps the loader's words to itself, and an
    import that fails half-way costs a second (xformers) where this costs a millisecond.

    Raises:
        OSError: what the dynamic loader says.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    found = (importlib.machinery.PathFinder.find_spec(name, folders) for name in names)
    library = next((each.origin for each in found if each), None)
    if library:
        ctypes.CDLL(library)


def _import(name: str) -> None:
    import_module(name)


def _run_torchvision(name: str) -> None:
    """Runs one operator: with the wrong torch, an import can succeed and every operator fail."""
    _load_library(name, "_C", "_C_stable")
    torch, ops = import_module("torch"), import_module("torchvision.ops")
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]], device="cpu")
    scores = torch.tensor([0.9, 0.8, 0.7], device="cpu")
    kept = ops.nms(boxes, scores, 0.5).tolist()
    if kept != [0, 2]:
        raise RuntimeError(f"torchvision.ops.nms kept the boxes {kept}, not [0, 2]")


def _run_torchaudio(name: str) -> None:
    """Runs one filter, which is an operator of its library: y[n] = x[n] + y[n-1] / 2."""
    torch, functional = import_module("torch"), import_module("torchaudio.functional")
    impulse, feedback, gain = torch.tensor([[1.0, 0, 0], [1, -0.5, 0], [1, 0, 0]], device="cpu")
    heard = functional.lfilter(impulse, feedback, gain).tolist()
    if heard != [1.0, 0.5, 0.25]:
        raise RuntimeError(f"torchaudio.functional.lfilter answered {heard}, not [1.0, 0.5, 0.25]")


def _run_xformers(name: str) -> None:
    """Imports what diffusers does. Its operators need a GPU, so its library must at least load."""
    _load_library(name, "_C")
    import_module("xformers.ops")
    failure = import_module("xformers._cpp_lib")._cpp_library_load_exception
    if failure is not None:
        raise failure


_PROBES: dict[str, Callable[[str], None]] = {
    "torchvision": _run_torchvision,
    "torchaudio": _run_torchaudio,
    "xformers": _run_xformers,
}
