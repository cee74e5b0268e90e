"""What the operator sets: the only reader of the environment.

Every field of a class below is one environment variable, its name in capitals. The README's table
and `.runpod/hub.json` list the names of `Settings`; a test compares the three.
"""

import os
import re
import urllib.request
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr

from avatar_client.environment import BucketVariables, FromEnvironment, ResultSigning

SECRET_NAMES = re.compile(
    r"SECRET|TOKEN|PASSWORD|(API|ACCESS|SIGNING|PRIVATE)_KEY|SIGNING_URL|CREDENTIAL"
)


class _JobSettings(FromEnvironment):
    """The model, and the limits of a job."""

    avatar_model: Literal["hunyuan-video-avatar", "demo"] = Field(
        default="hunyuan-video-avatar",
        description="Which model answers. `demo` is a small one of drawn faces, for trying the "
        "worker without a GPU.",
    )
    model_dir: str = Field(
        default="",
        description="Directory of the converted weights. Empty: `/models/hunyuan-video-avatar` in "
        "the image, RunPod's model cache and `/runpod-volume/hunyuan-video-avatar` are searched.",
    )
    model_repository: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Repository of the converted weights on the Hugging Face hub, as "
        "`organization/name`, for RunPod's model cache.",
    )
    allow_model_download: bool = Field(
        default=False,
        description="Downloads `MODEL_REPOSITORY` at the start where no other place holds a model.",
    )
    memory_plan: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="GPU memory that the worker may take, in GiB. Empty: what is free.",
    )
    num_gpus: int = Field(
        default=0,
        ge=0,
        description="How many of the worker's GPUs make a video together: 1, 2, 4 or 8. 0: as many "
        "of these as it sees.",
    )
    import_guard: Literal["auto", "block", "require", "off"] = Field(
        default="auto",
        description="What happens to a torchvision, torchaudio or xformers that is installed: "
        "`auto` hides a broken one, `block` hides all, `require` fails on a broken one, `off` "
        "leaves them. Read by `worker/import_guard.py` before anything else is imported.",
    )
    max_input_bytes: int = Field(
        default=256 * 2**20, ge=1, description="Largest image or audio file accepted, in bytes."
    )
    max_image_pixels: int = Field(
        default=250_000_000, ge=1, description="Largest image accepted, in pixels."
    )
    max_audio_seconds: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest speech for one video, in seconds.",
    )
    download_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="Time for one download, in seconds.",
    )
    job_timeout_seconds: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="The worker's own limit for one job, in seconds. 0: none.",
    )
    price_per_second: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="What a second of this worker costs, all its GPUs together, in US dollars: a "
        "dry run and a job's metrics then tell the cost. Empty: they do not.",
    )
    store_retry_seconds: float = Field(
        default=300.0,
        ge=0,
        allow_inf_nan=False,
        description="For how long an object store is asked again that fails or does not answer, in "
        "seconds.",
    )
    c2pa_certificate: SecretStr | None = Field(
        default=None,
        description="Certificate that signs videos by C2PA, with those that vouch for it, as PEM "
        "text or its file. Empty: files say by plain metadata alone that they are generated.",
    )
    c2pa_private_key: SecretStr | None = Field(
        default=None, description="Its private key, as PEM text or its file."
    )
    c2pa_signing_url: SecretStr | None = Field(
        default=None,
        description="Instead of the key: the address of a service that signs with it.",
    )
    result_retry_seconds: float = Field(
        default=600.0,
        ge=0,
        allow_inf_nan=False,
        description="For how long a finished job's result is sent again where RunPod does not take "
        "it, in seconds. No further job is taken meanwhile.",
    )
    resume_interval_seconds: float = Field(
        default=120.0,
        ge=0,
        allow_inf_nan=False,
        description="How often the state of a running job is kept, from which it goes on after the "
        "worker was lost, in seconds. 0: never.",
    )
    resume_dir: str = Field(
        default="",
        description="Directory for these states, which must outlive the worker. Empty: on "
        "`/runpod-volume` if a network volume is mounted there, else in the operator's bucket.",
    )
    resume_secret: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="What proves these states to be the worker's own, at least 16 characters, the "
        "same for all workers. Empty: it follows from `BUCKET_SECRET_ACCESS_KEY`.",
    )


class Settings(ResultSigning, BucketVariables, _JobSettings):
    """The worker's settings, checked. Listed from the last base's to the first's, then these."""

    allow_overwrite: bool = Field(
        default=True,
        description="Whether a job may replace another job's object, by `output.overwrite`.",
    )
    runpod_log_level: Literal["NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR"] = Field(
        default="INFO", description="Least level that is logged."
    )
    runpod_allow_private_download_urls: bool = Field(
        default=False,
        description="Lets jobs name http and private addresses. For development only.",
    )


class PlatformSettings(FromEnvironment):
    """Variables of the RunPod SDK that the worker's own checks heed too."""

    runpod_skip_gpu_check: bool = False  # a worker without a GPU may start


def proxy_for(host: str, port: int) -> SplitResult | None:
    """The proxy by which a host is reached; None: no proxy.

    It is that of `HTTPS_PROXY` or `ALL_PROXY`, unless `NO_PROXY` names the host. Both spellings of
    the names count, the one in small letters first.

    Raises:
        ValueError: it is none that speaks plain HTTP; names the variable, not its value.
    """
    proxies = urllib.request.getproxies_environment()
    address = proxies.get("https") or proxies.get("all")
    # urllib's own rule, which typeshed has for macOS alone
    bypass: Any = getattr(urllib.request, "proxy_bypass_environment")  # noqa: B009
    if not address or bypass(f"{host}:{port}"):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise ValueError("HTTPS_PROXY: only proxies of the form http://host:port are spoken to")
    return proxy


def secret_values() -> list[str]:
    """What stands in the environment under names of secrets; some are of RunPod or the Hub."""
    return [value for name, value in os.environ.items() if SECRET_NAMES.search(name)]


def environment_without_secrets() -> dict[str, str]:
    """This process's own, for one of ours that is told by messages what it needs to know."""
    return {name: value for name, value in os.environ.items() if not SECRET_NAMES.search(name)}


def keep_logs_from_clients() -> None:
    """Has the SDK, from 2.0 on, attach no log to a failed job, whatever the operator has set."""
    os.environ["RUNPOD_LOG_CAPTURE"] = "off"


def configure_collectives() -> None:
    """Has Gloo and NCCL talk over the loopback interface, between processes of one machine.

    They read it from the environment, here and in the rank processes. What the operator has set
    stays.
    """
    for name, value in {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",  # nothing uses it, and containers may refuse it
        # NCCL's failures end the process from within: before a client is told. The worker watches.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    }.items():
        os.environ.setdefault(name, value)


def peer_access_is_allowed() -> bool:
    """Whether GPUs may use each other's memory: by NCCL's variable, which also goes for it."""
    return os.environ.get("NCCL_P2P_DISABLE", "0") == "0"


def bare_environment() -> dict[str, str]:
    """What a process needs that decodes strangers' files, and no secret.

    It computes in one thread; its memory is one heap, which a limit can be set to, of large pages,
    which a new process is quicker to get.
    """
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "LANG", "LC_ALL")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
