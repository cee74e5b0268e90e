"""From a hub on loopback to a model directory: the whole way, cut off in the middle, refused."""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from builder.download import VARIANTS, read_upstream
from local_endpoint import LocalEndpoint, WorkerProcess
from tests.builder.hub_server import COMMIT, REPOSITORY, HubServer
from tests.builder.toy_repository import (
    AGREEMENT,
    BAKE,
    ROOT,
    arguments,
    environment,
    start_bake,
    toy_repository,
)
from tests.conftest import ONE_THREAD
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.loading import manifest, preview
from worker.loading.model_directory import require_whole

TRANSFORMERS = "ckpts/hunyuan-video-t2v-720p/transformers"
LLAVA = "ckpts/llava_llama_image"

# Dies in the middle of writing the transformer's weights.
DYING_BAKE = f"""
import os, signal
from builder import shards
save_file = shards.save_file
def save_half(tensors, path, metadata):
    save_file(tensors, path, metadata=metadata)
    if path.parent.name == "transformer":
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
shards.save_file = save_half
{BAKE}
"""
# Believes that every disk has room.
HOPEFUL_BAKE = """
from builder import bake, download
bake.require_space = download.require_space = lambda *arguments: None
bake.main()
"""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return toy_repository(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(published: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer(dict(published)) as server:
        yield server


def operator_of(model_dir: Path) -> dict[str, str]:
    """The settings of a worker with that model."""
    return {"AVATAR_MODEL": "hunyuan-video-avatar", "MODEL_DIR": str(model_dir)} | ONE_THREAD


def run(hub: HubServer, variant: str, target: Path, code: str = BAKE) -> tuple[int, str]:
    """Exit code and log of the command."""
    process = start_bake(hub, variant, target, code)
    log = process.communicate(timeout=300)[1]
    return process.returncode, log


@pytest.fixture(scope="session")
def baked(published: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory for each variant, each in a folder of its own."""
    directories: dict[str, Path] = {}
    for variant in VARIANTS:
        directories[variant] = tmp_path_factory.mktemp(variant) / "model"
    with HubServer(dict(published)) as server:
        bakes = [start_bake(server, *item) for item in directories.items()]
        for process in bakes:
            log = process.communicate(timeout=300)[1]
            assert process.returncode == 0, log
    return directories


@pytest.fixture
def model_dir(baked: dict[str, Path], tmp_path: Path) -> Path:
    """A baked directory that the test may damage."""
    shutil.copytree(baked["bf16"], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_baked_directory_is_a_pipeline(baked: dict[str, Path], variant: str) -> None:
    require_whole(baked[variant], hashes=True)
    assert preview.NAME in (manifest.read(baked[variant]) or {})["files"]
    pipeline = HunyuanVideoAvatarPipeline.from_pretrained(baked[variant])
    assert pipeline.transformer.config.float8_blocks is (variant == "fp8")


@pytest.mark.parametrize("variant", ["fp8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_handler_serves_a_job_from_a_baked_directory(
    baked: dict[str, Path],
    variant: str,
    own_endpoint: LocalEndpoint,
    tmp_path: Path,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> None:
    operator = operator_of(baked[variant])
    job = {
        "image": base64.b64encode(make_portrait()).decode(),
        "audio": base64.b64encode(make_speech(seconds=0.2)).decode(),
        "resolution": 256,
        "num_inference_steps": 1,
    }
    with WorkerProcess(own_endpoint, tmp_path / "worker", environment=operator) as worker:
        worker.wait_until_polling(timeout_seconds=300)
        done = own_endpoint.wait(own_endpoint.submit({"input": job}), timeout_seconds=300)
        assert done.status == "COMPLETED", worker.log
    assert f"model directory {baked[variant]} (MODEL_DIR)" in worker.log
    assert done.output["worker"]["model"] == "hunyuan-video-avatar"
    assert done.output["warnings"] == []  # the checkpoint's detector has found its face
    video = base64.b64decode(done.output["video_base64"])
    assert hashlib.sha256(video).hexdigest() == done.output["sha256"]
    with av.open(io.BytesIO(video), "r") as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert frames == done.output["num_frames"] == 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sources_are_gone_and_the_lock_file_stays(baked: dict[str, Path], variant: str) -> None:
    beside = {path.name for path in baked[variant].parent.iterdir()}
    assert beside == {"model", "model.lock.json"}
    assert not list(baked[variant].rglob("*.part"))
    assert not (baked[variant] / manifest.JOURNAL).exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_manifest_says_what_it_is_and_where_it_comes_from(
    baked: dict[str, Path], variant: str
) -> None:
    content = manifest.read(baked[variant])
    assert content is not None
    assert content["variant"] == variant
    assert content["dtypes"]["transformer"] == {"bf16": ["BF16"], "fp8": ["BF16", "U8"]}[variant]
    encoder = {"bf16": ["F32"], "fp8": ["BF16", "F32", "U8"]}  # the toy is published in 32 bits
    assert content["dtypes"]["text_encoder"] == encoder[variant]
    on_disk = {str(path.relative_to(baked[variant])) for path in files_of(baked[variant])}
    assert content["files"].keys() == on_disk - {manifest.NAME}
    assert content["sources"]["repository"] == REPOSITORY
    assert content["sources"]["commit"] == COMMIT
    weights = [name for name in content["sources"]["files"] if name.startswith(TRANSFORMERS)]
    assert len(weights) == {"bf16": 2, "fp8": 3}[variant]
    assert content["licence"]["name"] == read_upstream().licence


def test_the_agreement_and_its_notice_go_with_the_weights(baked: dict[str, Path]) -> None:
    assert (baked["bf16"] / "LICENSE").read_bytes() == AGREEMENT
    assert "Copyright (c) 2025 Tencent" in (baked["bf16"] / "NOTICE").read_text()


def test_the_encoders_keep_the_published_precision(
    baked: dict[str, Path], published: dict[str, bytes]
) -> None:
    content = manifest.read(baked["bf16"])
    assert content is not None
    kept = content["dtypes"]
    assert (kept["text_encoder"], kept["audio_encoder"]) == (["F32"], ["F16"])


@pytest.mark.slow
def test_a_bake_killed_in_a_download_is_no_model_and_resumes(
    hub: HubServer, baked: dict[str, Path], tmp_path: Path
) -> None:
    shard = f"{LLAVA}/model-00002-of-00004.safetensors"
    hub.held_at[shard] = 1000
    process = start_bake(hub, "bf16", tmp_path / "model")
    assert hub.waiting.wait(60)
    part = tmp_path / "model.sources" / f"{shard}.part"
    while part.stat().st_size < 1000:
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not (tmp_path / "model" / manifest.NAME).exists()
    with pytest.raises(RuntimeError, match=r"manifest\.json is missing"):
        require_whole(tmp_path / "model")
    assert not list((tmp_path / "model.sources" / TRANSFORMERS).iterdir())  # converted, so gone
    hub.requests.clear()

    code, log = run(hub, "bf16", tmp_path / "model")

    assert code == 0, log
    assert hub.ranges(shard) == ["bytes=1000-"]
    assert hub.ranges(f"{TRANSFORMERS}/mp_rank_00_model_states.pt") == []
    assert contents(tmp_path / "model") == contents(baked["bf16"])
    assert not (tmp_path / "model.sources").exists()


@pytest.mark.slow
def test_a_bake_killed_while_it_writes_weights_is_no_model_and_resumes(
    hub: HubServer, baked: dict[str, Path], tmp_path: Path
) -> None:
    code, _ = run(hub, "bf16", tmp_path / "model", DYING_BAKE)
    assert code == -9
    halves = list((tmp_path / "model" / "transformer").iterdir())
    assert [path.suffix for path in halves] == [".part"]
    with pytest.raises(RuntimeError, match=r"manifest\.json is missing"):
        require_whole(tmp_path / "model")
    hub.requests.clear()

    code, log = run(hub, "bf16", tmp_path / "model")

    assert code == 0, log
    assert hub.ranges(f"{TRANSFORMERS}/mp_rank_00_model_states.pt") == []  # was whole
    assert contents(tmp_path / "model") == contents(baked["bf16"])


def test_a_second_bake_fetches_nothing_and_another_variant_is_refused(
    hub: HubServer, model_dir: Path
) -> None:
    code, log = run(hub, "bf16", model_dir)
    assert code == 0, log
    assert "is there already, and whole" in log
    assert hub.requests == []

    code, log = run(hub, "fp8", model_dir)
    assert code == 1
    assert log.splitlines()[-1].endswith("holds the variant bf16: choose another")


@pytest.mark.slow
def test_weights_that_the_converter_does_not_know_end_in_their_names(
    hub: HubServer, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"module": {"another.weight": torch.zeros(2)}}, path)
    hub.files[f"{TRANSFORMERS}/mp_rank_00_model_states.pt"] = path.read_bytes()

    code, log = run(hub, "bf16", tmp_path / "model")

    assert code == 8
    assert "unknown: another.weight" in log.splitlines()[-1]
    assert not (tmp_path / "model" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [({"token": "hf_needed"}, 3), ({"served_instead": "ckpts/whisper-tiny/config.json"}, 6)],
)
def test_a_download_that_fails_ends_the_bake_with_its_code_and_no_model(
    hub: HubServer, tmp_path: Path, fault: dict[str, str], expected: int
) -> None:
    hub.token = fault.get("token")
    if path := fault.get("served_instead"):
        hub.served_instead[path] = b"{}"
        hub.listed_bytes[path] = 2

    code, log = run(hub, "bf16", tmp_path / "model")

    assert code == expected, log
    assert "Traceback" not in log
    assert not (tmp_path / "model" / "model_index.json").exists()


def test_a_disk_without_room_for_source_and_target_is_refused_at_once(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.listed_bytes[f"{LLAVA}/model-00001-of-00004.safetensors"] = 10**15

    code, log = run(hub, "bf16", tmp_path / "model")

    assert code == 7
    assert "GB free and 2000000.1 GB are needed" in log  # source and target
    assert hub.requests == []


@pytest.mark.slow
def test_a_disk_that_fills_up_while_converting_ends_in_one_line(
    hub: HubServer, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*in_namespace, mount]).returncode:
        pytest.skip("no small disk can be mounted here")
    bake = [*arguments("bf16", disk / "model", HOPEFUL_BAKE), "--work", str(tmp_path)]
    full = subprocess.run(
        [*in_namespace, f'{mount} && exec "$@"', "sh", *bake],
        cwd=ROOT,
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
    )

    assert full.returncode == 7, full.stderr
    last = full.stderr.splitlines()[-1]
    assert last.startswith(f"the disk of {disk / 'model'} is full: make room and run the same")


def test_verify_says_whole_or_names_every_damaged_file(model_dir: Path) -> None:
    verify = [sys.executable, "-m", "builder.verify", str(model_dir), "--hashes"]
    good = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, f"{model_dir} is whole\n")

    (model_dir / "vae" / "config.json").unlink()
    os.truncate(model_dir / "LICENSE", 3)
    bad = subprocess.run(verify[:-1], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "vae/config.json is missing" in bad.stderr
    assert "LICENSE has 3 bytes instead of" in bad.stderr


DAMAGES = {
    "cut by a byte": lambda content: content[:-1],
    "longer by a byte": lambda content: content + b"\0",
    "emptied": lambda content: b"",
    "removed": None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_of_another_length_is_found_at_the_start(model_dir: Path, damage: Any) -> None:
    for path in files_of(model_dir):
        whole = path.read_bytes()
        if damage is not None:
            path.write_bytes(damage(whole))
        elif path.name != manifest.NAME:
            path.unlink()
        else:
            continue  # the lengths are then taken from the weights themselves
        with pytest.raises(RuntimeError, match=path.name):
            require_whole(model_dir)
        path.write_bytes(whole)
    require_whole(model_dir)


@pytest.mark.parametrize("where", [0.0, 0.0001, 0.25, 0.5, 0.75, 1.0])
def test_one_changed_byte_of_any_file_is_found_by_its_hash(model_dir: Path, where: float) -> None:
    for path in files_of(model_dir):
        at = round(where * (path.stat().st_size - 1))
        with changed_byte(path, at), pytest.raises(RuntimeError, match=path.name):
            require_whole(model_dir, hashes=True)
    require_whole(model_dir, hashes=True)


def test_every_byte_of_a_small_file_is_covered_by_its_hash(model_dir: Path) -> None:
    small = [path for path in files_of(model_dir) if path.stat().st_size < 1000]
    for path in set(files_of(model_dir)) - set(small):
        path.unlink()
    for path in small:
        name = str(path.relative_to(model_dir))
        entry = {name: manifest.describe(path)}
        for at in range(path.stat().st_size):
            with changed_byte(path, at):
                assert manifest.faults(model_dir, entry, hashes=True) == [
                    f"{name} was changed: its sha256 is not the manifest's"
                ]


def test_every_byte_of_the_manifest_proves_itself(model_dir: Path) -> None:
    path = model_dir / manifest.NAME
    for at in range(path.stat().st_size):
        with changed_byte(path, at), pytest.raises(RuntimeError, match=r"manifest\.json was"):
            require_whole(model_dir)


def test_a_model_that_has_lost_its_manifest_is_not_taken_for_verified(model_dir: Path) -> None:
    (model_dir / manifest.NAME).unlink()
    with pytest.raises(RuntimeError, match=r"manifest\.json is missing"):
        require_whole(model_dir, hashes=True)


def test_a_worker_with_a_damaged_model_says_which_file_and_takes_no_job(
    model_dir: Path, own_endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    path = model_dir / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    operator = operator_of(model_dir)
    with WorkerProcess(own_endpoint, tmp_path / "worker", environment=operator) as worker:
        assert worker.wait(timeout_seconds=300) == 1
    assert not own_endpoint.wait_for_worker(worker.worker_id, timeout_seconds=0)
    assert f"vae/{path.name} has" in worker.log


@contextmanager
def changed_byte(path: Path, at: int) -> Iterator[None]:
    """One bit of the file is another one inside the context."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        for value in (byte ^ 1, byte):
            file.seek(at)
            file.write(bytes([value]))
            file.flush()
            if value != byte:
                yield


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in files_of(directory)}
