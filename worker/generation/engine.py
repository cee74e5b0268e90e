"""The model on its devices: chooses them, and what of the model lies there when.

Jobs call `encode`, `denoise` and `decode_frames` one after the other. Whatever torch raises inside
them becomes an error of ours here.
"""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from PIL import Image

from avatar_client.contract import job_errors
from avatar_client.contract.request import Aspect, Fit, GenerationParams
from worker.framing import Framing
from worker.generation import pipeline_loading
from worker.generation.conditioning import Conditioning
from worker.generation.denoising_state import DenoisingState, ModelIdentity, code_fingerprint
from worker.generation.options import DecodeOptions, DenoiseOptions
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.prefetch import prefetch
from worker.generation.preview import FramePreview
from worker.generation.step_cache import host_bytes
from worker.generation.voices import Voice
from worker.generation.watch import Watch
from worker.loading import manifest, model_directory, preview
from worker.loading.offload import DECODER_SCRATCH_BYTES, GIB, MemoryPlan
from worker.loading.report import LoadReport
from worker.model import autoencoder, flash_attention_4
from worker.model.latent_to_rgb import LatentToRGB
from worker.model.linear import float8_works
from worker.model.sparse_attention import SparseAttention, sparse_attention_works
from worker.multi_gpu.controller import RankController
from worker.multi_gpu.parallel import BranchParallel, NoParallel
from worker.multi_gpu.process_group import NUM_CFG_BRANCHES, RANK_COUNTS
from worker.settings import Settings
from worker.shapes import LONG_SIDE, SAMPLE_RATE_HZ, Box, FrameSize, uses_cfg, window_tokens

logger = logging.getLogger(__name__)

RANK_LOAD = "worker.generation.engine:Engine.load"  # what a rank process runs; tests put faults in
RANK_LOAD_SECONDS = 60  # beyond this GPU's own loading and as much again, for the other ranks'
HOST_SHARE = 0.9  # of the host's free memory, for the step cache of a long video
TRIAL_SIDE = 64  # px
# Bfloat16 and another order of sums make 0.01 to 0.08, by the weights and the kernel, because
# guidance multiplies what they do to either branch; where tokens are mixed up it is over 1.
TRIAL_TOLERANCE = 0.3


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model, alone on its device or at the head of other ranks.

    It is in one of these states:
        loaded: as `load` returns it; computes alone.
        joined: as `join` returns it; the ranks of the other GPUs take part in each job.
        lost: a rank was lost, for good. No job is begun any more; only `close` is left.
    """

    pipeline: HunyuanVideoAvatarPipeline
    device: torch.device
    load_seconds: float
    load_report: LoadReport
    plan: MemoryPlan | None = None  # None: on a CPU
    has_float8: bool = False  # whether the linear layers can compute in 8 bits here
    has_sparse_attention: bool = False  # whether attention can leave blocks of keys out here
    latent_to_rgb: LatentToRGB | None = None  # None: no preview is possible
    ranks: RankController | None = None  # of the other GPUs; None: there are none
    weights: str = ""  # the fingerprint of the model directory

    @classmethod
    def start(cls, settings: Settings) -> "Engine":
        """Loads the model on each GPU that the settings allow, side by side.

        Call it from a thread that lasts as long as the process: the rank processes end with it.

        Raises:
            OSError, RuntimeError, ValueError: as `load`, on any GPU; too few GPUs.
        """
        devices = rank_devices(settings)
        if len(devices) == 1:
            return cls.load(settings)
        ranks = RankController(settings, devices, RANK_LOAD)
        try:
            engine = cls.load(settings, devices[0])
            return engine.join(ranks, RANK_LOAD_SECONDS + 2 * engine.load_seconds)
        except BaseException:
            ranks.close()
            raise

    def join(self, ranks: RankController, timeout_seconds: float) -> "Engine":
        """This engine at the head of the other ranks, once they have loaded.

        A small job, alone and together, shows that all of them compute the same.

        Raises:
            RuntimeError: one of them failed, was not ready in time, or computes something else.
            WorkerError: one of them failed in the small job.
        """
        trial = self.pipeline.encode(
            Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE)),
            [Voice(np.zeros(SAMPLE_RATE_HZ, np.float32), (0, 0, TRIAL_SIDE, TRIAL_SIDE))],
            prompt="",
            height=TRIAL_SIDE,
            width=TRIAL_SIDE,
        )
        params = GenerationParams(num_inference_steps=1)
        expected = self.denoise(trial, params, 0)
        ranks.join(self.pipeline.transformer, timeout_seconds)
        engine = replace(self, ranks=ranks)
        latents = engine.denoise(trial, params, 0)
        off = ((latents - expected).norm() / expected.norm()).item()
        if not off < TRIAL_TOLERANCE:
            raise RuntimeError(f"the GPUs together compute other values than one: {off:.0%} off")
        logger.info("%d GPUs work together", ranks.num_ranks)
        return engine

    @classmethod
    def load(cls, settings: Settings, device: torch.device | None = None) -> "Engine":
        """Loads the model that the settings name and places it.

        On a GPU it is warmed up too: else the first job would pay for what the GPU's libraries set
        up at their first use, and find out that they do not work.

        Raises:
            OSError, RuntimeError, ValueError: weights are missing, damaged, or do not fit the
                model, or the warm-up failed.
        """
        started = time.monotonic()
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.index is not None:
            torch.cuda.set_device(device)  # for what asks for "cuda" alone
        if device.type == "cuda":
            flash_attention_4.begin_loading()  # while the weights come
        location = model_directory.find(settings)
        logger.info("%s", location)
        pipeline, report, plan = pipeline_loading.load(location.path, device, settings.memory_plan)
        logger.info("weights: %s", report)
        pipeline.set_progress_bar_config(disable=True)  # the reporter's values go to the client
        load_seconds = time.monotonic() - started
        logger.info("model %s ready on %s in %.1f s", settings.avatar_model, device, load_seconds)
        has_float8 = device.type == "cuda" and float8_works(device)
        # Its tensors are in no memory plan: where weights have to make room, all keys are seen.
        has_room = plan is not None and plan.all_resident
        has_sparse_attention = has_room and sparse_attention_works(device)
        channels = pipeline.vae.config.latent_channels
        engine = cls(
            pipeline,
            device,
            load_seconds,
            report,
            plan,
            has_float8,
            has_sparse_attention,
            preview.load(location.path, channels),
            weights=manifest.fingerprint(location.path),
        )
        if device.type == "cuda":
            engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Makes one frame of silence in one step, as a job would, at the smallest size.

        Raises:
            RuntimeError: it failed; says why.
        """
        started = time.monotonic()
        params = GenerationParams(resolution=256, num_inference_steps=1)
        portrait = Image.new("RGB", (params.resolution, params.resolution))
        waveform = np.zeros(round(SAMPLE_RATE_HZ / params.fps), np.float32)
        try:
            conditioning = self.encode(portrait, [Voice(waveform, None)], params)
            latents = self.denoise(conditioning, params, 0)
            for _ in self.decode_frames(conditioning, latents):
                pass
        except job_errors.WorkerError as error:
            raise RuntimeError(f"the warm-up failed: {error.__cause__}") from error
        logger.info("warmed up in %.1f s", time.monotonic() - started)

    def require_fits_memory(
        self,
        portrait: Image.Image,
        resolution: int,
        aspect: Aspect = "source",
        fit: Fit = "cover",
    ) -> None:
        """Returns if a video of that portrait fits into the GPU's memory.

        Raises:
            InputTooLargeError: it does not; names the resolutions that do.
        """
        given = FrameSize(portrait.height, portrait.width)
        sizes = {each: Framing.of(given, each, aspect, fit).model for each in LONG_SIDE}
        if self.plan is None or self.plan.fits(sizes[resolution]):
            return
        fitting = [str(each) for each in sorted(sizes) if self.plan.fits(sizes[each])]
        width, height = sizes[resolution].width, sizes[resolution].height
        raise job_errors.InputTooLargeError(
            f"{width} x {height} pixels do not fit into the memory of this worker's GPU; "
            f"resolutions that do, for this portrait: {', '.join(fitting) or 'none'}",
            field="resolution",
        )

    def encode(
        self,
        portrait: Image.Image,
        voices: Sequence[Voice],
        params: GenerationParams,
        size: FrameSize | None = None,
    ) -> Conditioning:
        """What the denoiser is told about portrait, voices and prompt.

        `size` is that of the frames; None: what fits the portrait.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with _failures_as_ours():
            return self.pipeline.encode(
                image=portrait,
                voices=voices,
                prompt=params.prompt,
                negative_prompt=params.negative_prompt,
                resolution=params.resolution,
                **_sides(size),
                fps=params.fps,
                motion_pose=params.motion.pose,
                motion_expression=params.motion.expression,
                bystanders=params.bystanders,
            )

    def find_face(self, portrait: Image.Image, resolution: int) -> Box | None:
        """The largest face, in pixels of the portrait; None: there is none."""
        with _failures_as_ours():
            return self.pipeline.find_face(portrait, resolution)

    def find_faces(self, portrait: Image.Image, resolution: int) -> list[Box]:
        """All faces, from left to right, in pixels of the portrait."""
        with _failures_as_ours():
            return self.pipeline.find_faces(portrait, resolution)

    def foresee(
        self, portrait: Image.Image, params: GenerationParams, size: FrameSize | None = None
    ) -> tuple[str, ...]:
        """The warnings that `encode` would give, in a fraction of its time."""
        with _failures_as_ours():
            return self.pipeline.foresee(
                portrait,
                params.prompt,
                params.negative_prompt,
                params.face_box,
                params.resolution,
                **_sides(size),
            )

    def denoise(
        self,
        conditioning: Conditioning,
        params: GenerationParams,
        seed: int,
        watch: Watch = Watch(),  # noqa: B008 (frozen)
        state: DenoisingState | None = None,
    ) -> torch.Tensor:
        """Latents of the video, from all ranks that it has work for.

        `watch` may have what `sparse_attention` and `preview` give; sparse attention then reports
        on all ranks.
        `state` is one that an earlier run's `on_state` was given: this one goes on from there.
        """
        self._require_host_room(conditioning, _num_cfg_branches(params))
        options = self._options(params)
        if state is not None:
            options = replace(options, first_step=state.step)
        job: AbstractContextManager[BranchParallel] = nullcontext(NoParallel())
        if self.ranks is not None:
            job = self.ranks.job(conditioning, options, seed, _num_cfg_branches(params))
        with _failures_as_ours(), job as parallel:
            latents = self.denoise_part(conditioning, options, seed, parallel, watch, state)
            if not torch.isfinite(latents).all():
                raise job_errors.GenerationError("the model computed no numbers")
            return latents

    def _require_host_room(self, conditioning: Conditioning, num_branches: int) -> None:
        """Returns if the host's memory holds the step cache of a long video.

        Raises:
            InputTooLargeError: it does not.
        """
        plan = conditioning.plan
        if plan.single_window:
            return
        config = self.pipeline.transformer.config
        size = FrameSize(conditioning.height, conditioning.width)
        num_bytes = num_branches * host_bytes(
            plan.num_windows,
            window_tokens(size),
            conditioning.prompt_embeds.shape[1],
            config.num_attention_heads
            * config.attention_head_dim
            * max(2, self.pipeline.transformer.dtype.itemsize),  # 8 bits are of weights alone
        )
        if num_bytes > HOST_SHARE * psutil.virtual_memory().available:
            raise job_errors.InputTooLargeError(
                f"speech of that length needs {num_bytes / GIB:.0f} GiB of this worker's memory at "
                f"{size.width} x {size.height} pixels; shorten it by "
                "max_seconds, or choose a lower resolution",
                field="max_seconds",
            )

    def identity(self, params: GenerationParams) -> ModelIdentity:
        """What a state of such a video must agree with to go on here."""
        options = self._options(params)
        dtypes = [f"{name} {getattr(self.pipeline, name).dtype}" for name in ("transformer", "vae")]
        arithmetic = [
            self.device.type,
            *dtypes,
            f"float8 {options.float8}",
            f"attention {options.attention_tolerance or 'exact'}",
        ]
        return ModelIdentity(
            weights=self.weights,
            code=code_fingerprint(),
            arithmetic=", ".join(arithmetic),
            gpu=self.gpu_name or "CPU",
        )

    def sparse_attention(self, params: GenerationParams, seed: int) -> SparseAttention | None:
        """The sparse attention of one video; None: all of it is computed."""
        tolerance = self._options(params).attention_tolerance
        return None if tolerance is None else SparseAttention(tolerance, seed, self.device)

    def preview(self, conditioning: Conditioning) -> FramePreview | None:
        """What shows a middle frame of one video while it is made; None: the model has no map."""
        if self.latent_to_rgb is None:
            return None
        return FramePreview(self.latent_to_rgb, conditioning.plan.kept_latents // 2)

    def _options(self, params: GenerationParams) -> DenoiseOptions:
        return DenoiseOptions.from_params(
            params, has_float8=self.has_float8, has_sparse_attention=self.has_sparse_attention
        )

    def denoise_part(
        self,
        conditioning: Conditioning,
        options: DenoiseOptions,
        seed: int,
        parallel: BranchParallel,
        watch: Watch = Watch(),  # noqa: B008 (frozen)
        state: DenoisingState | None = None,
    ) -> torch.Tensor:
        """The same, by what this rank does of it. The other ranks do no more; raises as torch."""
        tolerance = options.attention_tolerance
        if tolerance is not None and not self.has_sparse_attention:  # rank 0 has
            sparsity = SparseAttention(tolerance, seed, self.device, sees_all=True)
            watch = replace(watch, sparsity=sparsity)
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.pipeline.denoise(
            conditioning,
            options,
            generator=generator,
            parallel=parallel,
            state=state,
            watch=watch,
        )

    def decode_frames(
        self, conditioning: Conditioning, latents: torch.Tensor
    ) -> Generator[np.ndarray]:
        """The video in chunks of (frames, height, width, 3) uint8, cut and not rounded.

        A GPU decodes the next chunk while the last one is used: close what is not used up.
        """
        options = DecodeOptions(
            num_frames=conditioning.num_frames, scratch_bytes=self._scratch_bytes
        )
        with _failures_as_ours(), self._tile_map(latents, options) as tile_map:
            decoded = self.pipeline.decode_frames(
                latents, options.num_frames, options.scratch_bytes, tile_map
            )
            chunks = map(to_uint8, decoded)  # keeps no chunk, as a loop would
            with closing(decoded):
                yield from prefetch(chunks) if self.device.type == "cuda" else chunks

    @contextmanager
    def _tile_map(
        self, latents: torch.Tensor, options: DecodeOptions
    ) -> Iterator[autoencoder.TileMap]:
        """Inside, what gives the decoded tiles of a video: from all ranks, or from this one alone.

        All ranks decode, also those that rest while a video without CFG is denoised.
        """
        ranks = self.ranks
        if (
            ranks is None
            or ranks.is_lost  # after its part was done: this video needs it no more
            or not ranks.decode_alike(self.tile_arithmetic)
            or len(autoencoder.tiles(self.pipeline.vae, latents, options.num_frames)) == 1
        ):
            yield map
            return
        with ranks.decoding(latents, options) as gatherer:
            yield gatherer.map

    def decode_tiles(
        self, latents: torch.Tensor, options: DecodeOptions, tile_map: autoencoder.TileMap
    ) -> None:
        """Has `tile_map` decode another rank's part of the tiles; raises as torch."""
        self.pipeline.decode_tiles(latents, options.num_frames, options.scratch_bytes, tile_map)

    @property
    def tile_arithmetic(self) -> str:
        """Ranks of which it is the same decode a tile to the same values, with room for it."""
        where = self.gpu_name or f"CPU, {torch.get_num_threads()} threads"
        return f"{where}, {self.pipeline.vae.dtype}, {self._scratch_bytes} bytes at once"

    @property
    def _scratch_bytes(self) -> int:
        """Of the chunk that is decoded; the frames of another one differ in their last bits."""
        has_room = self.plan is None or self.plan.all_resident
        return autoencoder.SCRATCH_BYTES if has_room else DECODER_SCRATCH_BYTES

    def num_gpus(self, params: GenerationParams) -> int:
        """How many GPUs (on a CPU: processes) generate such a video."""
        if self.ranks is None:
            return 1
        return self.ranks.num_active_ranks(_num_cfg_branches(params))

    @property
    def num_ranks(self) -> int:
        """Processes of this model: one, or one for each GPU that works on a job."""
        return self.ranks.num_ranks if self.ranks is not None else 1

    @property
    def is_lost(self) -> bool:
        """Whether another rank is lost: the worker must end, and be started anew."""
        return self.ranks is not None and self.ranks.is_lost

    @property
    def stuck_error(self) -> job_errors.WorkerError | None:
        """The error of a job whose thread waits in vain for a lost rank; None: it does not."""
        return self.ranks.stuck_error if self.ranks is not None else None

    def close(self) -> None:
        """Ends the other ranks' processes, if there are any."""
        if self.ranks is not None:
            self.ranks.close()

    @property
    def gpu_name(self) -> str | None:
        """The GPU as its driver names it; None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    @property
    def peak_memory_gib(self) -> float | None:
        """Most GPU memory that this job held at once; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)


def check_gpu() -> None:
    """Raises unless a GPU is there and computes.

    Raises:
        RuntimeError: no GPU, or a wrong sum.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible")
    total = torch.ones(1024, device="cuda").sum().item()
    if total != 1024:
        raise RuntimeError("the GPU computed a wrong sum")


def rank_devices(settings: Settings) -> list[torch.device]:
    """One for each rank that the settings allow.

    Raises:
        RuntimeError: there are fewer GPUs than the settings ask for.
    """
    num_visible = torch.cuda.device_count()
    if num_visible == 0:
        return [torch.device("cpu")] * _usable_num_ranks(settings.num_gpus or 1)
    if settings.num_gpus > num_visible:
        raise RuntimeError(f"NUM_GPUS is {settings.num_gpus}, and {num_visible} are visible")
    usable = _usable_num_ranks(settings.num_gpus or num_visible)
    if usable < num_visible:
        logger.warning("%d of %d GPUs are used", usable, num_visible)
    return [torch.device("cuda", index) for index in range(usable)]


def _usable_num_ranks(number: int) -> int:
    """How many ranks, of at most so many, can share the work."""
    return max(count for count in RANK_COUNTS if count <= number)


def _sides(size: FrameSize | None) -> dict[str, int]:
    return {} if size is None else {"height": size.height, "width": size.width}


def _num_cfg_branches(params: GenerationParams) -> int:
    """CFG branches of such a video."""
    return NUM_CFG_BRANCHES if uses_cfg(params.guidance_scale) else 1


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """(F, 3, H, W) float32 in [0, 1] to (F, H, W, 3) uint8 on the CPU; takes the frames."""
    pixels = frames.mul_(255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def _failures_as_ours() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise job_errors.OutOfMemoryError(
            "the GPU's memory is too small for this resolution"
        ) from error
    except RuntimeError as error:  # torch has no narrower class on all of 2.11 to 2.13
        if "CUDA" in str(error):
            raise job_errors.GpuFaultError("the GPU failed") from error
        raise job_errors.GenerationError("the model failed") from error
    except ValueError as error:
        raise job_errors.GenerationError("the model refused the input") from error
