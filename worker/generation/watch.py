"""What looks on while the latents of a video are computed. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.generation.denoising_state import DenoisingState
    from worker.generation.preview import FramePreview
    from worker.model.sparse_attention import SparseAttention

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told of a run, and what is shown of it. None of it changes the latents."""

    # `on_step(step, num_inference_steps)` after each finished step, counted from 1; what it raises
    # ends the run and reaches the caller.
    on_step: OnStep | None = None
    # Before `on_step`, after each step from which a state can go on; it must not wait.
    on_state: "Callable[[DenoisingState], None] | None" = None
    preview: "FramePreview | None" = None  # sees what each step predicts
    # This rank's sparse attention, as the options ask for it, of one who reads afterwards what all
    # ranks left out.
    sparsity: "SparseAttention | None" = None
