"""What a finished job answers: the fields of its `output`.

The README's table says the same in a reader's order; a test compares both with a real result.
"""

from typing import Any, Literal, NotRequired, TypedDict


class MotionUsed(TypedDict):
    """`motion` of the request as it was used."""

    pose: float
    expression: float


class ParametersUsed(TypedDict):
    """The part of the request that decides how a video is computed, its defaults filled in."""

    preset: str
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    motion: MotionUsed


class OverTime(TypedDict):
    """A figure of a video at its start, at its end, and where it is worst."""

    start: float
    end: float
    worst: float


class Drift(TypedDict):
    """How far the video leaves its portrait as it goes on."""

    identity: OverTime | None  # correlation of the face above the mouth; 1: the portrait's
    colour_mean: OverTime  # distance of the mean colours in Lab; 2 is hardly seen
    colour_spread: OverTime  # distance of their standard deviations


class Metrics(TypedDict):
    """What the job took. A stage is missing if it did not run: all are, in a reused result."""

    download_seconds: NotRequired[float]
    preprocess_seconds: NotRequired[float]
    denoise_seconds: NotRequired[float]
    decode_seconds: NotRequired[float]
    upload_seconds: NotRequired[float]
    total_seconds: float
    cost_usd: float | None  # of them, in US dollars; None unless the operator has set a price
    peak_memory_gib: float | None  # None without a GPU
    gpu: str | None
    num_gpus: int | None  # that denoised this video
    # of presets whose attention may leave keys out: the share that was computed (1: all), the
    # largest error (relative norm) that was measured and kept, and how often all had to be computed
    attention_density: NotRequired[float]
    attention_error: NotRequired[float]
    attention_fallbacks: NotRequired[int]
    # of a job that an earlier worker had begun: steps that were not done again, and their seconds
    resumed_from_step: NotRequired[int]
    seconds_saved: NotRequired[float]
    drift: NotRequired[Drift]
    model_load_seconds: float | None  # of this worker's start
    model_load_bytes: int | None
    model_load_gigabytes_per_second: float | None
    model_load_disk_ratio: float | None  # of the disk's own speed


class WorkerIdentity(TypedDict):
    """Which worker it was."""

    version: str
    model: str
    imports: dict[str, str]  # what became of torchvision, torchaudio and xformers


class SpeakerShown(TypedDict):
    """Who spoke when, and with which face."""

    name: str | None  # the request's own
    face_box: list[float] | None  # in pixels of the upright image; None: the whole frame moved
    start_seconds: float  # in the video
    duration_seconds: float


class JobResult(TypedDict):
    """A video, where it is, and how it was made."""

    request_id: str | None  # the request's own
    delivery: Literal["s3", "inline"]
    video_url: str | None  # presigned or public; None: it is in the reply
    video_base64: str | None
    thumbnail_url: str | None  # None unless asked for
    thumbnail_base64: str | None
    gif_url: str | None  # likewise
    gif_base64: str | None
    bucket: str | None
    key: str | None
    expires_at: str | None  # of the presigned URL: UTC, as 2026-01-31T12:00:00Z
    content_type: str
    size_bytes: int
    sha256: str  # of the mp4, hexadecimal
    duration_seconds: float
    num_frames: int
    fps: float
    width: int
    height: int
    seed: int
    # what the video says of being generated: by plain metadata, or signed by C2PA too
    provenance: Literal["metadata", "c2pa"]
    speakers: list[SpeakerShown]  # in the request's order; one, where that had `audio`
    parameters: ParametersUsed
    user_data: Any
    warnings: list[str]
    reused: NotRequired[Literal[True]]  # the job had been done before: this is from the bucket
    metrics: Metrics
    worker: WorkerIdentity
    signature: NotRequired[str]  # where the endpoint has a key for it


class Plan(TypedDict):
    """What a job would make."""

    width: int
    height: int
    num_frames: int
    fps: float
    duration_seconds: float
    num_windows: int
    num_inference_steps: int
    num_computed_steps: int  # of them; the others reuse a part of an earlier one
    delivery: Literal["s3", "inline"]
    key: NotRequired[str]  # in the bucket


class FaceFound(TypedDict):
    """A face of the portrait."""

    index: int  # from the left, as a speaker's `face` has it
    face_box: list[float]  # in pixels of the upright image


class DryRunResult(TypedDict):
    """The answer to a request with `dry_run`."""

    dry_run: Literal[True]
    plan: Plan
    faces: list[FaceFound]
    faces_thumbnail: str  # the portrait with their numbers: a JPEG as a `data:` URL, below 60 kB
    estimate_seconds: float | None  # of the whole job; None before this worker's first video
    estimate_usd: float | None  # what they cost; None unless the operator has set a price
    warnings: list[str]  # those of the video that the job would make
    user_data: Any
    worker: WorkerIdentity
    signature: NotRequired[str]
