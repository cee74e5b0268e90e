"""Where the worker looks for its model, and what it takes for one."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.builder.hub_server import HubServer
from worker.loading import manifest, model_directory
from worker.service import fitness
from worker.service.worker import Worker
from worker.settings import Settings

ROOT = Path(__file__).parents[2]
MIRROR = "someone/avatar-bf16"
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "audio_encoder")


def safetensors(num_bytes: int) -> bytes:
    header = json.dumps(
        {"weight": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


def make_model(directory: Path, *, with_manifest: bool = True) -> Path:
    """The files that a model directory has, with weights of a few bytes."""
    for part in PARTS:
        (directory / part).mkdir(parents=True)
        (directory / part / "config.json").write_text("{}")
        (directory / part / "model.safetensors").write_bytes(safetensors(64))
    shards = {f"block.{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (directory / "transformer" / "model.safetensors").unlink()
    for shard in shards.values():
        (directory / "transformer" / shard).write_bytes(safetensors(64))
    index = directory / "transformer" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (directory / "model_index.json").write_text(json.dumps({part: ["a", "b"] for part in PARTS}))
    if with_manifest:
        files = (path for path in directory.rglob("*") if path.is_file())
        entries = {str(path.relative_to(directory)): manifest.describe(path) for path in files}
        manifest.write(directory, {"variant": "bf16", "files": entries})
    return directory


def snapshot(root: Path, commit: str) -> Path:
    name = f"models--{MIRROR.replace('/', '--')}"
    return root / model_directory.CACHE_DIR / name / "snapshots" / commit


def test_the_places_are_searched_in_their_order(tmp_path: Path) -> None:
    given = make_model(tmp_path / "given")
    baked = make_model(tmp_path / model_directory.BAKED_DIR)
    cached = make_model(snapshot(tmp_path, "a" * 40))
    on_volume = make_model(tmp_path / model_directory.VOLUME_DIR)
    settings = Settings(model_dir=str(given), model_repository=MIRROR)

    for place, path in (
        ("MODEL_DIR", given),
        ("the image", baked),
        ("RunPod's model cache", cached),
        ("the network volume", on_volume),
    ):
        found = model_directory.find(settings, tmp_path)
        assert (found.place, found.path) == (place, path)
        shutil.rmtree(path)
    with pytest.raises(FileNotFoundError):
        model_directory.find(settings, tmp_path)


def test_the_choice_says_why_each_place_before_it_was_skipped(tmp_path: Path) -> None:
    make_model(tmp_path / model_directory.VOLUME_DIR)
    (tmp_path / model_directory.BAKED_DIR).mkdir(parents=True)

    found = model_directory.find(Settings(model_repository=MIRROR), tmp_path)

    assert str(found) == (
        f"model directory {tmp_path / model_directory.VOLUME_DIR} (the network volume); "
        "skipped: "
        "MODEL_DIR: is not set; "
        f"the image: {tmp_path / model_directory.BAKED_DIR}: model_index.json is missing; "
        f"RunPod's model cache: {snapshot(tmp_path, 'x').parents[1]} has no snapshot"
    )


def test_the_demo_model_is_whole_and_comes_first_where_it_is_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / model_directory.BAKED_DIR)
    found = model_directory.find(Settings(avatar_model="demo"), tmp_path)
    assert found.path == model_directory.DEMO_DIR
    assert found.skipped == ()


def test_no_model_anywhere_is_an_error_that_names_every_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        model_directory.find(Settings(model_dir=str(tmp_path / "typo")), tmp_path)
    message = str(caught.value)
    for reason in (
        f"MODEL_DIR: {tmp_path / 'typo'}: no such directory",
        f"the image: {tmp_path / model_directory.BAKED_DIR}: no such directory",
        "RunPod's model cache: MODEL_REPOSITORY is not set",
        f"the network volume: {tmp_path / model_directory.VOLUME_DIR}: no such directory",
        "a download: ALLOW_MODEL_DOWNLOAD is not set",
    ):
        assert reason in message


def test_the_model_cache_gives_the_snapshot_that_main_stands_for(tmp_path: Path) -> None:
    old, new = (make_model(snapshot(tmp_path, letter * 40)) for letter in "ab")
    settings = Settings(model_repository=MIRROR)
    for path, seconds in ((old, 1000), (new, 2000)):
        os.utime(path, (seconds, seconds))
    assert model_directory.find(settings, tmp_path).path == new  # the latest, if nothing says

    refs = new.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert model_directory.find(settings, tmp_path).path == old


def test_the_links_of_the_model_cache_are_followed(tmp_path: Path) -> None:
    blobs = make_model(tmp_path / "blobs")
    linked = snapshot(tmp_path, "a" * 40)
    for path in (path for path in blobs.rglob("*") if path.is_file()):
        link = linked / path.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    settings = Settings(model_repository=MIRROR)
    assert model_directory.find(settings, tmp_path).path == linked

    cut(blobs / "vae" / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"vae/model\.safetensors"):
        model_directory.find(settings, tmp_path)


def test_a_damaged_model_is_not_skipped(tmp_path: Path) -> None:
    given = make_model(tmp_path / "given")
    make_model(tmp_path / model_directory.BAKED_DIR)
    cut(given / "vae" / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"vae/model\.safetensors has \d+ bytes instead of"):
        model_directory.find(Settings(model_dir=str(given)), tmp_path)


def test_weights_of_another_model_between_these_are_found(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    (model_dir / "transformer" / "model.safetensors").write_bytes(safetensors(64))
    with pytest.raises(
        RuntimeError, match=r"transformer/model\.safetensors is no part of this model"
    ):
        model_directory.require_whole(model_dir)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    (model_dir / "vae" / "config.json").unlink()
    cut(model_dir / "transformer" / "model-00002-of-00002.safetensors")
    with pytest.raises(RuntimeError) as caught:
        model_directory.require_whole(model_dir)
    assert "vae/config.json is missing" in str(caught.value)
    assert "transformer/model-00002-of-00002.safetensors has" in str(caught.value)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 8) + b"\xff" * 16)


@pytest.mark.parametrize("damage", [cut, lengthen, empty, garble, Path.unlink])
@pytest.mark.parametrize(
    "name", ["vae/model.safetensors", "transformer/model-00002-of-00002.safetensors"]
)
def test_without_a_manifest_the_weights_say_how_long_they_are(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    model_dir = make_model(tmp_path / "model", with_manifest=False)
    model_directory.require_whole(model_dir)

    damage(model_dir / name)

    with pytest.raises(RuntimeError, match=r"weights of vae|" + name.replace(".", r"\.")):
        model_directory.require_whole(model_dir)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/model.safetensors.index.json"])
def test_without_a_manifest_a_cut_index_is_named(tmp_path: Path, name: str) -> None:
    model_dir = make_model(tmp_path / "model", with_manifest=False)
    cut(model_dir / name)
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.") + " is damaged"):
        model_directory.require_whole(model_dir)


def test_hashes_need_a_manifest(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", with_manifest=False)
    with pytest.raises(RuntimeError, match=r"manifest\.json is missing"):
        model_directory.require_whole(model_dir, hashes=True)


def test_a_damaged_model_fails_the_fitness_check_with_the_files_name(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    cut(model_dir / "vae" / "model.safetensors")
    worker = Worker(Settings(model_dir=str(model_dir)))
    worker.load()
    [check] = [check for check in fitness.checks(worker) if check.__name__ == "model"]
    with pytest.raises(RuntimeError, match=r"vae/model\.safetensors has"):
        check()


# Downloads, in a process of their own, with the environment of the image

FIND = """
import sys
from pathlib import Path
from worker.loading import model_directory
from worker.settings import Settings
print(model_directory.find(Settings.from_env(), Path(sys.argv[1])).path)
"""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = make_model(tmp_path_factory.mktemp("mirror") / "model")
    paths = (path for path in directory.rglob("*") if path.is_file())
    files = {str(path.relative_to(directory)): path.read_bytes() for path in paths}
    return {**files, "README.md": b"a model", ".gitattributes": b"*.safetensors lfs"}


def find_with_download(hub: HubServer, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **hub.environment,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "home"),
        "MODEL_REPOSITORY": MIRROR,
        "ALLOW_MODEL_DOWNLOAD": "true",
    }
    return subprocess.run(
        [sys.executable, "-c", FIND, str(root)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("has_volume", [True, False])
def test_an_allowed_download_ends_on_the_volume_or_in_the_container(
    tmp_path: Path, mirror: dict[str, bytes], has_volume: bool
) -> None:
    place = model_directory.VOLUME_DIR if has_volume else model_directory.BAKED_DIR
    if has_volume:
        (tmp_path / "runpod-volume").mkdir()
    with HubServer(dict(mirror), repository=MIRROR) as hub:
        done = find_with_download(hub, tmp_path)
        assert done.stdout == f"{tmp_path / place}\n", done.stderr
        model_directory.require_whole(tmp_path / place, hashes=True)
        hub.requests.clear()
        assert find_with_download(hub, tmp_path).stdout == f"{tmp_path / place}\n"
        assert hub.requests == []


def test_a_download_that_fails_leaves_no_model_and_the_next_start_goes_on(
    tmp_path: Path, mirror: dict[str, bytes]
) -> None:
    shard = "transformer/model-00002-of-00002.safetensors"
    with HubServer(dict(mirror), repository=MIRROR, status={shard: [403] * 9}) as hub:
        failed = find_with_download(hub, tmp_path)
        assert f"RuntimeError: {MIRROR} was not downloaded: " in failed.stderr
        assert not (tmp_path / model_directory.BAKED_DIR).exists()
        hub.status.clear()
        hub.requests.clear()

        done = find_with_download(hub, tmp_path)

        assert done.stdout == f"{tmp_path / model_directory.BAKED_DIR}\n", done.stderr
        assert shard in [name for name, _ in hub.requests]


def test_a_download_that_is_not_what_its_manifest_says_is_refused(
    tmp_path: Path, mirror: dict[str, bytes]
) -> None:
    name = "vae/model.safetensors"
    other = mirror[name][:-1] + b"\1"
    with HubServer(dict(mirror), repository=MIRROR, served_instead={name: other}) as hub:
        failed = find_with_download(hub, tmp_path)
    assert f"{name} was changed: its sha256 is not the manifest's" in failed.stderr
    assert not (tmp_path / model_directory.BAKED_DIR).exists()


@contextmanager
def as_an_ordinary_user(*own: Path) -> Iterator[None]:
    """Inside, this process may write what `own` names and no other directory of the root user."""
    if os.geteuid() != 0:
        yield
        return
    for path in own:
        os.chown(path, 1000, 1000)
    os.seteuid(1000)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_download_goes_into_the_container_where_the_volume_is_another_user_s() -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path can be entered by its owner alone
        root = Path(name)
        volume, models = root / "runpod-volume", root / "models"
        for path in (volume, models):
            path.mkdir()
        volume.chmod(0o555)
        root.chmod(0o755)
        with as_an_ordinary_user(models):
            target = model_directory.download_target(root, 1)

        assert target == root / model_directory.BAKED_DIR
        volume.chmod(0o755)


@pytest.mark.parametrize(
    ("free_gb", "place"),
    [
        ({"runpod-volume": 50, "models": 50}, model_directory.VOLUME_DIR),
        ({"runpod-volume": 40, "models": 50}, model_directory.BAKED_DIR),
        ({"runpod-volume": 40, "models": 43}, None),
    ],
)
def test_a_download_begins_only_where_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gb: dict[str, int], place: Path | None
) -> None:
    (tmp_path / "runpod-volume").mkdir()

    def disk_usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free_gb[path.relative_to(tmp_path).parts[0]] * 10**9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    if place is not None:
        assert model_directory.download_target(tmp_path, 42_400_000_000) == tmp_path / place
        return
    with pytest.raises(RuntimeError, match=r"it needs 42.4 GB; .*40.0 GB free; .*43.0 GB free"):
        model_directory.download_target(tmp_path, 42_400_000_000)


def test_what_another_worker_has_put_there_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(repository: str, part: Path) -> None:
        make_model(part)
        make_model(tmp_path / model_directory.BAKED_DIR)

    monkeypatch.setattr(model_directory, "_fetch", fetch)
    monkeypatch.setattr(model_directory, "_published_bytes", lambda repository: 1)
    settings = Settings(model_repository="a/b", allow_model_download=True)

    found = model_directory.find(settings, tmp_path)

    assert found.path == tmp_path / model_directory.BAKED_DIR
