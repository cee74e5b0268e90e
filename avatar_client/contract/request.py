"""What a client may ask for: the fields of a request, their limits and their defaults.

All values are checked and frozen: no invalid request exists past `validated`.
"""

import base64
import binascii
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, TypeVar, get_args
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from avatar_client.contract import plain_json, plain_values
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
from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError
from avatar_client.contract.presets import PRESETS

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


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Where an input comes from: exactly one of an address and the bytes themselves."""

    url: str | None = None
    content: bytes | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, value: Any, info: ValidationInfo) -> Self:
        """A source from an https URL, a `data:` URI or plain base64.

        Raises:
            InputUrlBlockedError: an address of another scheme.
            ValueError: none of the three.
        """
        if not isinstance(value, str):
            raise ValueError("must be a string: an https URL, a data: URI or base64")
        text = value.strip()
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
        if scheme is None:
            return cls(content=_decode_base64(value))
        if scheme[1].lower() == "data":
            head, comma, payload = text.partition(",")
            parameters = [part.strip().lower() for part in head.split(";")]
            if not comma or "base64" not in parameters[1:]:
                raise ValueError("a data: URI must be data:<type>;base64,<data>")
            return cls(content=_decode_base64(unquote(payload)))  # `+`, `/` and `=` may be escaped
        if scheme[1].lower() not in ("https", "http"):
            raise InputUrlBlockedError("only https URLs are fetched", field=info.field_name)
        if len(text) > 4096 or not text.isprintable() or " " in text:
            raise ValueError("is not a well-formed URL")
        return cls(url=text)

    @property
    def digest(self) -> str:
        """Fingerprint of the source, for telling one request from another."""
        return hashlib.sha256(self.content or (self.url or "").encode()).hexdigest()


def _decode_base64(text: str) -> bytes:
    """The bytes of base64 in its common forms: with line breaks, for URLs, without padding.

    A blank inside is a `+` that a form has decoded: left out, it would shift all bits behind it.
    """
    lines = text.splitlines()
    whole = lines[0] if len(lines) == 1 else ""
    if whole != whole.strip() and len(whole) % 4 == 0:
        compact = whole  # a blank at its end is such a `+`, too, or the length would be another
    else:
        compact = "".join(line.strip(" \t") for line in lines)
        if whole != whole.strip() and len(compact) % 4:
            raise ValueError("is base64 with a blank at its end, which may stand for a '+'")
    if len(compact) % 4 and len(compact) < MIN_UNPADDED_CHARACTERS:
        raise ValueError("is neither an https URL, a data: URI nor base64")
    compact = compact.replace(" ", "+").translate(_URL_SAFE).rstrip("=")
    try:
        content = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        raise ValueError("is neither an https URL, a data: URI nor base64") from None
    if not content:
        raise ValueError("is empty")
    return content


MIN_UNPADDED_CHARACTERS = 64  # a word or a path has no padding either, and no media is so short
_URL_SAFE = str.maketrans("-_", "+/")


Model = TypeVar("Model", bound=BaseModel)
Media = Annotated[
    MediaSource,
    BeforeValidator(MediaSource.parse),
    PlainSerializer(lambda source: source.digest, return_type=str),
    WithJsonSchema({"type": "string"}),
]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,  # which may be a secret under a mistyped key
    )

    @model_validator(mode="before")
    @classmethod
    def _as_declared(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return plain_values.as_declared(values, cls.model_fields)


class Motion(_Frozen):
    """How much the head and the face move; the reference's own values are the defaults."""

    pose: Annotated[Finite, Field(ge=0, le=100)] = Field(
        25.0, description="How much the head moves."
    )
    expression: Annotated[Finite, Field(ge=0, le=100)] = Field(
        30.0, description="How much the face moves."
    )


class Watermark(_Frozen):
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


class OutputOptions(_Frozen):
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


# Of `output`: what decides the video's bytes, and not where they go.
VIDEO_FIELDS = {"aspect", "fit", "background", "format", "codec", "quality", "watermark"}


class S3Config(_Frozen):
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


class GenerationParams(_Frozen):
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
    face_box: Annotated[tuple[Finite, Finite, Finite, Finite], Field(strict=False)] | None = Field(
        None,
        description="The face that speaks: x, y, width, height in pixels of the upright image. "
        "Empty: the largest.",
    )
    audio_start_seconds: Annotated[Finite, Field(ge=0)] = Field(
        0.0, description="Where in the recording the speech begins."
    )
    max_seconds: Annotated[Finite, Field(gt=0)] | None = Field(
        None, description="How many seconds of it are used. Empty: all."
    )

    @field_validator("fps")
    @classmethod
    def _fps_that_the_model_knows(cls, value: float) -> float:
        if value not in (25.0, 12.5):
            raise ValueError("must be 25 or 12.5")
        return value

    @field_validator("face_box")
    @classmethod
    def _box_with_an_area(
        cls, value: tuple[float, float, float, float] | None
    ) -> tuple[float, float, float, float] | None:
        if value is not None and (min(value) < 0 or min(value[2:]) < 1):
            raise ValueError("must be [x, y, width, height] in pixels of the image")
        return value


class JobInput(GenerationParams):
    """The `input` object of a job."""

    image: Media = Field(
        description="The portrait: JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF, JPEG 2000 or PPM."
    )
    audio: Media = Field(
        description="The speech: wav, mp3, m4a, ogg, opus, flac, webm, or the sound of an mp4."
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
        "estimate and the warnings.",
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


def described_fields(model: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each value that a request may hold: its dotted name, and its JSON schema.

    An object's values come by their own names, but for one that holds a secret.
    """
    schema = model.model_json_schema()
    yield from _described(schema["properties"], schema.get("$defs", {}), "")


def _described(
    properties: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in properties.items():
        # optional values are written as a choice between the value and null
        choices = [one for one in value.get("anyOf", [value]) if one.get("type") != "null"]
        form = {**choices[0], **value}
        inner = definitions.get(form.get("$ref", "").rpartition("/")[2], {}).get("properties", {})
        if inner and not any(one.get("writeOnly") for one in inner.values()):
            yield from _described(inner, definitions, f"{prefix}{name}.")
        else:
            yield prefix + name, form


def limits(described: Mapping[str, Any]) -> str:
    """What a field's JSON schema allows, in words; nothing where it says all by itself."""
    low, high = described.get("minimum"), described.get("maximum")
    if low is not None and high is not None:
        return f"{low:g} to {high:.16g}."
    if low is not None:
        return f"{low:g} or more."
    if (above := described.get("exclusiveMinimum")) is not None:
        return f"More than {above:g}."
    longest = described.get("maxLength")
    return "" if longest is None else f"At most {longest} characters."


def validated(model: type[Model], raw: Any, prefix: str = "") -> Model:
    """The checked values.

    Raises:
        InvalidInputError: a value cannot be served, or sent on; names the field, below `prefix`.
        InputUrlBlockedError: an input names an address that is never fetched.
    """
    plain_json.require_plain(raw, prefix)
    try:
        return model.model_validate(raw)
    except ValidationError as failure:
        error = failure.errors(include_url=False, include_input=False)[0]
        if error["type"] == "extra_forbidden":
            message = _unknown_key(model, error["loc"])
        else:
            message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
        raise InvalidInputError(
            message[:1].lower() + message[1:], field=plain_json.field_name(prefix, error["loc"])
        ) from None


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    for name in location[:-1]:
        [annotation] = (
            info.annotation
            for own_name, info in model.model_fields.items()
            if name == (info.alias or own_name)
        )
        [model] = (  # the model itself, or the model in "model or None"
            choice
            for choice in (annotation, *get_args(annotation))
            if isinstance(choice, type) and issubclass(choice, BaseModel)
        )
    known = [info.alias or name for name, info in model.model_fields.items()]
    given = str(location[-1])[: plain_json.MAX_FIELD_CHARACTERS]
    near = difflib.get_close_matches(given, known, n=1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known: {known}"
