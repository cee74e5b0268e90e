"""The download command against a hub on loopback that fails in every way that the real one does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from builder import download
from tests.builder.hub_server import COMMIT, REPOSITORY, HubServer

ROOT = Path(__file__).parents[2]
MODEL = "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"
SHARD = "ckpts/llava_llama_image/model-00002-of-00004.safetensors"
TOKENIZER = "ckpts/llava_llama_image/tokenizer.json"

# Impatient, so that giving up takes no minute.
IMPATIENT = "from builder import download; download.WAITS_SECONDS = (0.1, 0.1); download.main()"


def wanted(variant: str) -> list[str]:
    files = download.read_upstream().files
    return [file.path for file in files if variant in file.variants and not file.optional]


def published_files() -> dict[str, bytes]:
    """Something for every path, large enough that an answer has several pieces."""
    paths = sorted({*wanted("bf16"), *wanted("fp8"), "LICENSE", "ckpts/stable_syncnet.pt"})
    return {path: path.encode() * 3000 for path in paths}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(published_files()) as server:
        yield server


def command(
    hub: HubServer,
    target: Path,
    *arguments: str,
    variant: str = "bf16",
    code: str = "from builder import download; download.main()",
    environment: Mapping[str, str] | None = None,
    revision: str = COMMIT,
) -> subprocess.Popen[str]:
    given = ["--variant", variant, "--revision", revision, "--target", str(target), *arguments]
    return subprocess.Popen(
        [sys.executable, "-c", code, *given],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(target.parent), **hub.environment, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub: HubServer, target: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """Exit code and log of the command."""
    process = command(hub, target, *arguments, **options)
    log = process.communicate(timeout=300)[1]
    return process.returncode, log


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def locked(target: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(target.with_name(f"{target.name}.lock.json").read_text())
    return record


@pytest.mark.parametrize("variant", download.VARIANTS)
def test_the_files_of_the_variant_arrive_and_no_other(
    hub: HubServer, tmp_path: Path, variant: str
) -> None:
    code, log = run(hub, tmp_path / "weights", variant=variant)

    assert code == 0, log
    expected = {path: hub.files[path] for path in [*wanted(variant), "LICENSE"]}
    assert content(tmp_path / "weights") == expected


def test_the_lock_file_records_the_commit_and_every_hash(hub: HubServer, tmp_path: Path) -> None:
    run(hub, tmp_path / "weights")

    assert locked(tmp_path / "weights")["commit"] == COMMIT
    assert locked(tmp_path / "weights")["files"][TOKENIZER] == {
        "size_bytes": len(hub.files[TOKENIZER]),
        "sha256": hashlib.sha256(hub.files[TOKENIZER]).hexdigest(),
    }


def test_a_second_run_fetches_nothing(hub: HubServer, tmp_path: Path) -> None:
    run(hub, tmp_path / "weights")
    hub.requests.clear()

    code, log = run(hub, tmp_path / "weights")

    assert code == 0, log
    assert hub.requests == []


def test_without_a_revision_nothing_is_fetched_and_the_commit_of_main_is_named(
    hub: HubServer, tmp_path: Path
) -> None:
    code, log = run(hub, tmp_path / "weights", revision="")

    assert code == 2
    assert f"main is at {COMMIT} now: pass --revision {COMMIT}, or pin it in builder/" in log
    assert hub.requests == []
    assert not (tmp_path / "weights.lock.json").exists()


def test_a_branch_is_no_revision(hub: HubServer, tmp_path: Path) -> None:
    code, log = run(hub, tmp_path / "weights", revision="main")

    assert code == 2
    assert "'main' is no commit, which has 40 hexadecimal digits" in log


def test_a_later_run_asks_for_the_commit_of_the_first(hub: HubServer, tmp_path: Path) -> None:
    run(hub, tmp_path / "weights")
    code, log = run(hub, tmp_path / "weights", revision="")
    assert code == 0, log

    hub.commit = "f" * 40  # main has moved on
    code, log = run(hub, tmp_path / "other", revision=hub.commit)
    assert code == 0, log
    assert locked(tmp_path / "other")["commit"] == "f" * 40
    code, log = run(hub, tmp_path / "weights", revision="")
    assert code == 4
    assert f"{REPOSITORY} at {COMMIT}: not found (HTTP 404)" in log


@pytest.mark.parametrize("path", [MODEL, TOKENIZER])
def test_a_file_that_changed_on_the_hub_since_the_first_download_is_refused(
    hub: HubServer, tmp_path: Path, path: str
) -> None:
    run(hub, tmp_path / "weights")
    (tmp_path / "weights" / path).unlink()
    hub.files[path] = hub.files[path][::-1]

    code, log = run(hub, tmp_path / "weights")

    assert code == 6
    assert path in log
    assert not (tmp_path / "weights" / path).exists()


def test_a_file_damaged_on_the_disk_is_fetched_anew(hub: HubServer, tmp_path: Path) -> None:
    run(hub, tmp_path / "weights")
    damaged = tmp_path / "weights" / SHARD
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])

    code, log = run(hub, tmp_path / "weights")

    assert code == 0, log
    assert damaged.read_bytes() == hub.files[SHARD]
    assert f"{SHARD} has the sha256" in log


@pytest.mark.parametrize("path", [MODEL, TOKENIZER])
def test_a_cut_connection_is_taken_up_where_it_broke(
    hub: HubServer, tmp_path: Path, path: str
) -> None:
    hub.cut_at[path] = [1000, 50_000, 60_000]

    code, log = run(hub, tmp_path / "weights", code=IMPATIENT)

    assert code == 0, log
    assert (tmp_path / "weights" / path).read_bytes() == hub.files[path]
    assert hub.ranges(path) == [None, "bytes=1000-", "bytes=50000-", "bytes=60000-"]


def test_a_server_without_ranges_is_read_from_the_start_again(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.ignores_ranges = True
    hub.cut_at[MODEL] = [1000]

    code, log = run(hub, tmp_path / "weights")

    assert code == 0, log
    assert (tmp_path / "weights" / MODEL).read_bytes() == hub.files[MODEL]


def test_a_killed_run_goes_on_in_the_middle_of_a_file(hub: HubServer, tmp_path: Path) -> None:
    hub.held_at[MODEL] = 100_000
    process = command(hub, tmp_path / "weights")
    assert hub.waiting.wait(30)
    part = tmp_path / "weights" / f"{MODEL}.part"
    while not part.exists() or part.stat().st_size < 100_000:
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not (tmp_path / "weights" / MODEL).exists()
    hub.requests.clear()

    code, log = run(hub, tmp_path / "weights")

    assert code == 0, log
    assert (tmp_path / "weights" / MODEL).read_bytes() == hub.files[MODEL]
    assert hub.ranges(MODEL) == ["bytes=100000-"]
    assert content(tmp_path / "weights").keys() == {*wanted("bf16"), "LICENSE"}


def test_a_slow_file_that_stops_is_asked_for_again_after_the_timeout(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.held_at[MODEL] = 30_000

    code, log = run(hub, tmp_path / "weights", environment={"HF_HUB_DOWNLOAD_TIMEOUT": "1"})

    assert code == 0, log
    assert hub.ranges(MODEL) == [None, "bytes=30000-"]
    assert "timed out; trying again" in log


def test_a_server_that_is_busy_for_a_moment_is_asked_again(hub: HubServer, tmp_path: Path) -> None:
    hub.status = {"listing": [503], MODEL: [500, 429]}

    code, log = run(hub, tmp_path / "weights", code=IMPATIENT)

    assert code == 0, log
    assert f"{MODEL}: HTTP 429; trying again" in log


def test_a_server_that_stays_away_ends_the_download_with_its_own_exit_code(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.status = {MODEL: [503] * 9}

    code, log = run(hub, tmp_path / "weights", code=IMPATIENT)

    assert code == 5
    assert log.splitlines()[-1].startswith(f"{MODEL}: HTTP 503, 3 times in a row: check the netwo")
    assert not (tmp_path / "weights" / MODEL).exists()


def test_no_server_at_all_is_said_in_one_line(hub: HubServer, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code, log = run(hub, tmp_path / "weights", code=IMPATIENT, environment=nowhere)

    assert code == 5
    assert log.splitlines()[-1].startswith(f"{REPOSITORY} at {COMMIT}: ")
    assert "Traceback" not in log


def test_offline_mode_is_named_with_the_way_out(hub: HubServer, tmp_path: Path) -> None:
    code, log = run(hub, tmp_path / "weights", environment={"HF_HUB_OFFLINE": "1"})

    assert code == 5
    assert "run with HF_HUB_OFFLINE=0" in log


@pytest.mark.parametrize("path", [MODEL, TOKENIZER])
def test_wrong_content_is_thrown_away_and_named(hub: HubServer, tmp_path: Path, path: str) -> None:
    hub.served_instead[path] = b"x" * len(hub.files[path])

    code, log = run(hub, tmp_path / "weights")

    assert code == 6
    assert log.splitlines()[-1].startswith(f"{path} has ")
    assert not list((tmp_path / "weights").rglob(f"*{Path(path).name}*"))
    assert path not in locked(tmp_path / "weights")["files"]


def test_an_answer_shorter_than_the_listing_says_is_no_whole_file(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.served_instead[MODEL] = hub.files[MODEL][:5000]

    code, _ = run(hub, tmp_path / "weights", code=IMPATIENT)

    assert code == 5
    assert not (tmp_path / "weights" / MODEL).exists()


def test_a_gated_repository_says_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    hub.token = "hf_right"

    code, log = run(hub, tmp_path / "weights")

    assert code == 3
    last = log.splitlines()[-1]
    assert "access denied (HTTP 401): accept the licence on the repository's page" in last
    assert "--token-file" in last


@pytest.mark.parametrize("status", [401, 403])
def test_a_private_repository_says_what_to_do(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.status = {"listing": [status]}

    code, log = run(hub, tmp_path / "weights")

    assert code == 3
    assert f"{REPOSITORY} at {COMMIT}: access denied (HTTP {status})" in log


def test_the_token_of_a_build_secret_opens_the_files_and_goes_to_no_other_host(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.token = "hf_right"
    secret = tmp_path / "hf_token"
    secret.write_text("hf_right\n")

    code, log = run(hub, tmp_path / "weights", "--token-file", str(secret))

    assert code == 0, log
    assert set(hub.large_file_authorizations) == {None}
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != secret]
    assert not [path for path in written if b"hf_right" in path.read_bytes()]
    assert "hf_right" not in log


def test_the_token_of_the_environment_is_used_without_a_secret(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.token = "hf_right"
    environment = {"HF_TOKEN": "hf_right"}
    absent = str(tmp_path / "absent")

    code, log = run(hub, tmp_path / "weights", "--token-file", absent, environment=environment)

    assert code == 0, log
    assert f"no token in {absent}" in log


def test_a_file_that_is_not_published_is_named_before_anything_is_fetched(
    hub: HubServer, tmp_path: Path
) -> None:
    del hub.files[SHARD]

    code, log = run(hub, tmp_path / "weights")

    assert code == 4
    assert log.splitlines()[-1].startswith(f"{REPOSITORY} has no file {SHARD} at {COMMIT}: ")
    assert hub.requests == []


def test_an_optional_file_that_is_not_published_is_left_out_with_a_warning(
    hub: HubServer, tmp_path: Path
) -> None:
    del hub.files["LICENSE"]

    code, log = run(hub, tmp_path / "weights")

    assert code == 0
    assert "LICENSE is not published, and left out" in log


def test_a_file_that_vanishes_after_the_listing_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.status = {SHARD: [404]}

    code, log = run(hub, tmp_path / "weights")

    assert code == 4
    assert log.splitlines()[-1].startswith(f"{SHARD}: not found (HTTP 404)")


def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.listed_bytes[MODEL] = 10**18

    code, log = run(hub, tmp_path / "weights")

    assert code == 7
    assert "GB free and 1000000000.1 GB are needed" in log
    assert hub.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_disk_that_fills_up_meanwhile_ends_the_download_with_one_line(
    hub: HubServer, tmp_path: Path
) -> None:
    part = tmp_path / "weights" / f"{MODEL}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")  # every write to it fails with ENOSPC

    code, log = run(hub, tmp_path / "weights")

    assert code == 7
    expected = f"the disk of {tmp_path / 'weights'} is full: make room and run the same command"
    assert log.splitlines()[-1].startswith(expected)
    assert not (tmp_path / "weights" / MODEL).exists()


def test_a_target_that_cannot_be_written_is_named(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file, not a directory")

    code, log = run(hub, tmp_path / "weights")

    assert code == 1
    assert f"{tmp_path / 'weights'} cannot be written" in log.splitlines()[-1]


def test_every_published_path_is_named_once_and_no_hash_is_made_up() -> None:
    files = download.read_upstream().files
    assert len({file.path for file in files}) == len(files)
    for file in files:
        assert set(file.variants) <= set(download.VARIANTS)
        assert file.sha256 is None or len(file.sha256) == 64
