"""What a client may ask for: the fields of a request, their limits and their defaults.

All values are checked and frozen: no invalid request exists past `validated`.
"""

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from avatar_client.contract import speakers
from avatar_client.contract.bucket import (
    SEVEN_DAYS_SECONDS,
    AddressingStyle,
    BucketSettings,
    Checksums,
    ServerSideEncryption,
)
from avatar_client.contract.formats import (
    FORMATS,
    SUFFIXES,
    Codec,
    Container,
    VideoFormat,
    require_suffix,
)
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.media_source import Media
from avatar_client.contract.presets import PRESETS
from avatar_client.contract.schema import Finite, Frozen
from avatar_client.contract.speakers import MAX_PAUSE_SECONDS, FaceBox, Order, Speaker, Speakers

MAX_SEED = 2**53 - 1  # the largest whole number that every JSON reader keeps exact
MAX_PROMPT_CHARACTERS = 2000
MAX_USER_DATA_CHARACTERS = 1000

REQUEST_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Aspect = Literal["source", "1:1", "9:16", "16:9", "4:5"]
Fit = Literal["cover", "contain"]

KEY_PATTERN = r"^[A-Za-z0-9!_.()=-]+(/[A-Za-z0-9!_.()=-]+)*$"


def _key(value: str) -> str:
    """A part of an object's key that needs no escape and stays below what stands before it."""
    if re.fullmatch(KEY_PATTERN, value) is None:
        raise ValueError(
            "may hold the letters A to Z, digits and !_.()=- in folders divided by single slashes"
        )
    if {".", ".."} & set(value.split("/")):
        raise ValueError("must not hold '.' or '..' as a folder")
    return value


def _request_id(value: str) -> str:
    """An id that can stand in an object's key and a line of a log."""
    if re.fullmatch(REQUEST_ID_PATTERN, value) is None:
        raise ValueError(
            "may hold letters A to Z, digits and ._- and begins with none of the last three"
        )
    return value


class Motion(Frozen):
    """How much the head and the face move; the reference's own values are the defaults."""

    pose: Annotated[Finite, Field(ge=0, le=100)] = Field(
        25.0, description="How much the head moves."
    )
    expression: Annotated[Finite, Field(ge=0, le=100)] = Field(
        30.0, description="How much the face moves."
    )


class Watermark(Frozen):
    """A mark that people see, in a corner of every frame. Exactly one of text and picture."""

    # what Pillow's own font has; other letters are a picture's
    text: Annotated[str, Field(max_length=80, pattern=r"^[ -~©]*[!-~©][ -~©]*$")] | None = Field(
        None, description="A line of Latin letters without accents, digits and signs."
    )
    image: Media | None = Field(
        None, description="Or a picture, as `image` takes it; what is transparent in it stays so."
    )
    place: Literal["top-left", "top-right", "bottom-left", "bottom-right"] = Field(
        "bottom-right", description="The corner."
    )
    opacity: Annotated[Finite, Field(ge=0.1, le=1)] = Field(
        0.7, description="How much of the frame it hides."
    )

    @model_validator(mode="after")
    def _one_mark(self) -> Self:
        if (self.text is None) == (self.image is None):
            message = "must hold exactly one of text and image"
            raise InvalidInputError(message, field="output.watermark")
        return self


class OutputOptions(Frozen):
    """The video's shape and its file, and how it is handed over."""

    aspect: Aspect = Field(
        "source", description="Aspect ratio of the video. `source`: the portrait's."
    )
    fit: Fit = Field(
        "cover",
        description="What becomes of a portrait of another ratio. `cover`: the part around the "
        "face; `contain`: all of it, in the middle of a background.",
    )
    background: Annotated[str, Field(pattern=r"^(blur|#[0-9A-Fa-f]{6})$")] | None = Field(
        None,
        description="Of `contain`: `blur`, a blurred copy of the picture, or a colour as "
        "`#1a2b3c`. Empty: `blur`.",
    )
    format: Container = Field("mp4", description="The file. A webm's sound is Opus.")
    codec: Codec | None = Field(
        None, description="Of the picture: h264 or hevc in an mp4, vp9 in a webm. Empty: the first."
    )
    quality: Annotated[int, Field(ge=1, le=51)] | None = Field(
        None,
        description="The encoder's crf: the smaller, the better and the larger. Empty: h264 17, "
        "hevc 19, vp9 24.",
    )
    watermark: Watermark | None = None
    delivery: Literal["auto", "s3", "inline"] = Field(
        "auto", description="`inline` is base64 in the reply; `auto`: the bucket if there is one."
    )
    key: Annotated[str, Field(max_length=512), AfterValidator(_key)] | None = Field(
        None,
        description="Name of the object, below `BUCKET_PREFIX`, the folder `chosen` and "
        "`output.prefix`. Empty: `<job id>.mp4` without that folder, or `<request_id>.mp4` in the "
        "folder `requests`; `.webm` for one.",
    )
    prefix: Annotated[str, Field(max_length=256), AfterValidator(_key)] | None = Field(
        None,
        description="Folder below `BUCKET_PREFIX`. Neither `chosen` nor `requests`, where what "
        "`output.key` and `request_id` name lies.",
    )
    url_expires_seconds: Annotated[int, Field(ge=1, le=SEVEN_DAYS_SECONDS)] | None = Field(
        None, description="Life of the URL. Empty: `BUCKET_URL_EXPIRES_SECONDS`."
    )
    thumbnail: bool = Field(False, description="Also the first frame as a jpeg.")
    gif: bool = Field(
        False, description="Also the first four seconds as a small GIF, without sound."
    )
    overwrite: bool = Field(
        False,
        description="Whether an object that lies under `output.key` may be replaced, where the "
        "endpoint allows it. Else such a job is refused before anything is generated.",
    )

    @property
    def video_format(self) -> VideoFormat:
        """The kind of file."""
        return FORMATS[self.format]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        """Refuses what contradicts itself, by the field that can be left out."""
        chosen = self.video_format
        if self.codec is not None and self.codec not in chosen.codecs:
            message = f"{self.format} holds {' or '.join(chosen.codecs)}"
            raise InvalidInputError(message, field="output.codec")
        if self.background is not None and (self.fit != "contain" or self.aspect == "source"):
            message = "there is none but with output.fit 'contain' and another aspect than 'source'"
            raise InvalidInputError(message, field="output.background")
        require_suffix(self.key or "", self.format, "output.key")
        return self


# Beside the recordings: what decides how they become the video's speech.
SPEECH_FIELDS = ("order", "pause_seconds", "trim_silence")

# Of `output`: what decides the video's bytes, and not where they go.
VIDEO_FIELDS = {"aspect", "fit", "background", "format", "codec", "quality", "watermark"}


class S3Config(Frozen):
    """RunPod's own form of a bucket that comes with a job, and what some stores need beside it."""

    endpoint_url: Annotated[str, Field(max_length=2048)] | None = Field(None, alias="endpointUrl")
    access_key_id: Annotated[str, Field(alias="accessId", max_length=256)]
    secret_access_key: Annotated[SecretStr, Field(alias="accessSecret")]
    session_token: SecretStr | None = Field(None, alias="sessionToken")
    name: Annotated[str, Field(max_length=255)] | None = Field(None, alias="bucketName")
    region: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9-]+$")] | None = None
    addressing_style: AddressingStyle = Field("auto", alias="addressingStyle")
    server_side_encryption: ServerSideEncryption | None = Field(None, alias="serverSideEncryption")
    kms_key_id: Annotated[str, Field(max_length=2048)] | None = Field(None, alias="kmsKeyId")
    checksums: Checksums = "when_required"
    object_path: Annotated[str, Field(max_length=512), AfterValidator(_key)] | None = Field(
        None,
        alias="objectPath",
        description="A folder, or with `.mp4` or `.webm` at its end the whole key.",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_none(cls, values: Any) -> Any:
        """Without what is null or empty, and without the blanks around what was pasted."""
        if not isinstance(values, dict):
            return values
        stripped = {k: v.strip() if isinstance(v, str) else v for k, v in values.items()}
        if isinstance(path := stripped.get("objectPath"), str):
            stripped["objectPath"] = path.strip("/")
        return {name: value for name, value in stripped.items() if value not in (None, "")}

    def bucket(self) -> BucketSettings:
        """The bucket, marked as an address that the worker did not choose."""
        values = {**dict(self), "prefix": self._path[0], "from_client": True}
        del values["object_path"]
        return BucketSettings(**values)

    @property
    def object_name(self) -> str | None:
        """The video's name in the bucket's folder, if the object's path ends with one."""
        return self._path[1]

    @property
    def _path(self) -> tuple[str, str | None]:
        path = self.object_path or ""
        if not path.lower().endswith(SUFFIXES):
            return path, None
        folder, _, name = path.rpartition("/")
        return folder, name


def no_bucket_if_empty(value: Any) -> Any:
    """None for an `s3Config` that holds nothing: some clients always send one."""
    is_empty = isinstance(value, dict) and all(item in (None, "") for item in value.values())
    return None if is_empty else value


Bystanders = Literal["free", "still"]


class GenerationParams(Frozen):
    """What decides the frames, beside the two inputs."""

    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] = Field(
        "A person is speaking.", description="What the scene shows."
    )
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] | None = Field(
        None, description="What it must not show. Empty: the model's own list."
    )
    resolution: Literal[256, 384, 512, 704] = Field(
        704, description="About the short side, in pixels. Larger takes longer."
    )
    preset: Literal["quality", "balanced", "draft"] = Field(
        "quality",
        description="Steps of 50 that are computed in full: "
        + ", ".join(
            f"{name} {len(preset.step_cache_schedule.computed_steps(50))}"
            for name, preset in PRESETS.items()
        )
        + "; the last two in 8 bits. The fewer, the quicker, and the less exact.",
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=100)] = Field(
        50, description="Denoising steps. The preset says how many of them run in full."
    )
    guidance_scale: Annotated[Finite, Field(ge=0, le=20)] = Field(
        7.5,
        description="How closely prompt and speech are followed. Up to 1: off, twice as fast.",
    )
    flow_shift: Annotated[Finite, Field(ge=0.1, le=20)] = Field(
        5.0, description="How much of the steps is spent at high noise."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="The same seed gives the same video. Empty: drawn, and in the result."
    )
    fps: Finite = Field(25.0, description="25 or 12.5 frames a second.")
    motion: Motion = Motion()
    face_box: FaceBox | None = Field(
        None,
        description="The face that speaks `audio`: x, y, width, height in pixels of the upright "
        "image. Empty: the largest.",
    )
    bystanders: Bystanders = Field(
        "still",
        description="What the faces of those who do not speak are told. `still`: silence; `free`: "
        "nothing of their own, as in the reference, so that one beside a speaker may move too.",
    )
    audio_start_seconds: Annotated[Finite, Field(ge=0)] = Field(
        0.0, description="Where in `audio` the speech begins."
    )
    max_seconds: Annotated[Finite, Field(gt=0)] | None = Field(
        None, description="The longest that the speech may be; the rest is cut. Empty: all of it."
    )

    @field_validator("fps")
    @classmethod
    def _fps_that_the_model_knows(cls, value: float) -> float:
        if value not in (25.0, 12.5):
            raise ValueError("must be 25 or 12.5")
        return value


class JobInput(GenerationParams):
    """The `input` object of a job."""

    image: Media = Field(
        description="The portrait: JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF, JPEG 2000 or PPM."
    )
    audio: Media | None = Field(
        None,
        description="The speech: wav, mp3, m4a, ogg, opus, flac, webm, or the sound of an mp4. "
        "Required, unless there are `speakers`.",
    )
    speakers: Speakers | None = Field(
        None,
        description="In the place of `audio`: 1 to 4 recordings, each with the face that speaks "
        "it.",
    )
    order: Order = Field(
        "together",
        description="When the speakers begin. `together`: each at its `start_seconds`; `in_turn`: "
        "each when the one before has ended.",
    )
    pause_seconds: Annotated[Finite, Field(ge=0, le=MAX_PAUSE_SECONDS)] = Field(
        0.0, description="Between two speakers who speak `in_turn`."
    )
    trim_silence: bool = Field(
        False,
        description="Whether long silence at the start and at the end of each recording is cut "
        "off. Silence inside it stays in any case.",
    )
    request_id: Annotated[str, Field(max_length=128), AfterValidator(_request_id)] | None = Field(
        None,
        description="A name of the client's own for this request, of letters, digits and `._-`. "
        "However often the request is sent, one video is made of it, and each answer is that one; "
        "another request under the same name is refused. Needs a bucket. It is seen in logs and "
        "in the key: choose one that nobody guesses and that tells nothing.",
    )
    output: OutputOptions = OutputOptions()
    user_data: Any = Field(
        None, description=f"Echoed. At most {MAX_USER_DATA_CHARACTERS} characters of JSON."
    )
    dry_run: bool = Field(
        False,
        description="Checks everything, fetches and probes the media, answers the plan, an "
        "estimate, the warnings, and all `faces` with `faces_thumbnail`, a small picture in which "
        "each has its number.",
    )
    preview: bool = Field(
        False,
        description="While the job runs, about ten times a small JPEG of a middle frame in the "
        "progress, as it will roughly look.",
    )
    s3_config: Annotated[S3Config | None, BeforeValidator(no_bucket_if_empty)] = Field(
        default=None,
        alias="s3Config",
        description="A bucket of the client's own: `endpointUrl`, `accessId`, `accessSecret`, "
        "`bucketName`, and where its store needs them `region`, `sessionToken`, `addressingStyle`, "
        "`serverSideEncryption`, `kmsKeyId`, `checksums`; `objectPath` is a folder or a key in it. "
        "Also at the job's top level.",
    )

    @field_validator("user_data")
    @classmethod
    def _small_json(cls, value: Any) -> Any:
        if len(json.dumps(value)) > MAX_USER_DATA_CHARACTERS:
            raise ValueError(f"must be at most {MAX_USER_DATA_CHARACTERS} characters of JSON")
        return value

    @model_validator(mode="after")
    def _someone_speaks(self) -> Self:
        """Refuses what leaves open who speaks, or when."""
        if self.speakers is None:
            if self.audio is None:
                raise InvalidInputError("field required, or speakers in its place", field="audio")
        elif self.audio is not None:
            message = "are in the place of audio, not beside it: leave one of them out"
            raise InvalidInputError(message, field="speakers")
        elif self.face_box is not None or self.audio_start_seconds:
            field = "audio_start_seconds" if self.face_box is None else "face_box"
            message = "belongs to audio; speakers have face_box and start_seconds of their own"
            raise InvalidInputError(message, field=field)
        if self.pause_seconds and self.order != "in_turn":
            message = "there is none but with order 'in_turn'; together, start_seconds says it"
            raise InvalidInputError(message, field="pause_seconds")
        speakers.require_apart(self.speakers or ())
        if self.max_seconds is not None and self.order == "together":
            for index, speaker in enumerate(self.speakers or ()):
                if speaker.start_seconds >= self.max_seconds:
                    raise speakers.never_heard(speaker.start_seconds, self.max_seconds, index)
        return self

    @property
    def voices(self) -> tuple[Speaker, ...]:
        """All who speak, whichever way the request says it."""
        if self.speakers is not None:
            return self.speakers
        assert self.audio is not None
        return (Speaker(audio=self.audio, face_box=self.face_box),)

    def field_of(self, index: int, name: str) -> str:
        """What errors call a field of one of the `voices`."""
        return name if self.speakers is None else f"speakers.{index}.{name}"
