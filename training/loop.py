"""One training run: learning rate schedule, average of the weights (EMA), checkpoints and log."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.muon import Muon
from worker.atomic_file import atomic_write

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
LOGGED_STEPS = 25
CHECKPOINT_STEPS = 50
EMA_DECAY = 0.995


def train(
    model: nn.Module,
    backward: Callable[[], dict[str, Tensor]],
    *,
    directory: Path,
    steps: int,
    learning_rate: float,
    decay_share: float = 0.3,
    seconds: float | None = None,
) -> nn.Module:
    """Trains the model in place; resumes an earlier run in the directory.

    Matrices are stepped by Muon, all else by AdamW. The rate warms up over 50 steps, stays, and
    falls to zero over the last `decay_share` of the run, be it the steps that end it or the time.
    What is returned is the model with the exponential moving average (EMA) of its weights.

    Args:
        model: in float32; its forward passes may run in bfloat16.
        backward: sets the parameters' gradients, and returns metrics for the log, each a
            scalar on any device.
        directory: gets `checkpoint.pt` and `log.jsonl`.
        steps: at most, those of earlier runs counted.
        learning_rate: AdamW's; Muon's is ten times as much.
        decay_share: share of the run over which the rate falls.
        seconds: that this call has; None: as many as the steps take. Without any, an earlier run
            stays as it is, and a new one takes one step.

    Raises:
        ArithmeticError: the weights are no longer finite; the last checkpoint's are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    optimizers = _optimizers(model, learning_rate)
    weights = list(model.state_dict().values())
    ema = [value.detach().clone() for value in weights]
    clock = Clock(steps, seconds)
    path = directory / CHECKPOINT
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=weights[0].device)
        model.load_state_dict(state["model"])
        ema = state["ema"]
        clock = Clock(steps, seconds, step=state["step"], progress=state["progress"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    log = Log(directory / LOG)
    while clock.progress < 1:
        rate = min(1, (clock.step + 1) / 50, (1 - clock.progress) / decay_share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
        metrics = backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, clock.step / (clock.step + 10))
        torch._foreach_lerp_(ema, weights, 1 - decay)
        clock.tick()
        is_last = clock.progress >= 1
        log.add(metrics, clock.step, is_last=is_last)
        if clock.step % CHECKPOINT_STEPS == 0 or is_last:
            if any(not math.isfinite(value.sum().item()) for value in ema):
                raise ArithmeticError("the training diverged")  # the last checkpoint stays
            _save(path, model, ema, optimizers, clock)
    model.load_state_dict(dict(zip(model.state_dict(), ema, strict=True)))
    return model.eval()


class Clock:
    """How far a run is, by its steps and by its time, whichever is further."""

    def __init__(
        self, steps: int, seconds: float | None, step: int = 0, progress: float = 0.0
    ) -> None:
        self.step = step
        self.progress = max(progress, step / steps)  # 1 at the end
        if step and seconds is not None and seconds <= 0:
            self.progress = 1.0
        self._steps = steps
        self._seconds = seconds
        self._first = self.progress
        self._began = time.monotonic()

    def tick(self) -> None:
        """A step is done."""
        self.step += 1
        self.progress = max(self.progress, self.step / self._steps)
        if self._seconds is not None:
            share = (time.monotonic() - self._began) / self._seconds if self._seconds > 0 else 1.0
            self.progress = max(self.progress, self._first + (1 - self._first) * min(share, 1.0))


@dataclass
class Log:
    """Means of the metrics over some steps, a line each."""

    path: Path
    began: float = field(default_factory=time.monotonic)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, metrics: dict[str, Tensor], step: int, *, is_last: bool) -> None:
        """Those of a step; they are read in some steps alone: each reading waits for the device."""
        self.metrics.append(metrics)
        if step % LOGGED_STEPS and not is_last:
            return
        line: dict[str, Any] = {"step": step}
        for name in self.metrics[0]:
            mean = torch.stack([each[name] for each in self.metrics]).mean()
            line[name] = round(mean.item(), 5)
        self.metrics.clear()
        line["seconds"] = round(time.monotonic() - self.began, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)  # noqa: T201


def mixed_precision(device: torch.device, *, cache_enabled: bool = True) -> torch.autocast:
    """The forward pass in bfloat16 on a GPU, in float32 elsewhere.

    On a CPU a 3-d convolution takes ten to twenty times as long in bfloat16 as in float32.
    """
    return torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=cache_enabled
    )


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, without waiting for what it still computes."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class LossGradients:
    """The gradients of a loss; on a GPU, whose launches would cost more, by CUDA graphs.

    Each set of shapes that the inputs come in has a graph of its own, recorded when they come for
    the second time. The graphs share the memory of what is computed in between.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    ) -> None:
        self._parameters = list(model.parameters())
        self._loss = loss
        self._recordings: dict[tuple[torch.Size, ...], _Recording | None] = {}  # None: seen once
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Sets the parameters' gradients."""
        if inputs[0].device.type != "cuda":
            return self._backward(*inputs)
        shapes = tuple(value.shape for value in inputs)
        if (
            shapes not in self._recordings
        ):  # what libraries set up at their first use is not recorded
            self._recordings[shapes] = None
            return self._backward_aside(*inputs)
        recording = self._recordings[shapes]
        if recording is None:
            recording = self._recordings[shapes] = self._record(inputs)
        torch._foreach_copy_(recording.inputs, inputs)
        recording.graph.replay()
        for parameter, gradient in zip(self._parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in recording.metrics.items()}

    def _backward(self, *inputs: Tensor) -> dict[str, Tensor]:
        loss, metrics = self._loss(*inputs)
        loss.backward()
        return {"loss": loss.detach(), **metrics}

    def _backward_aside(self, *inputs: Tensor) -> dict[str, Tensor]:
        """As a graph is recorded, on another stream than the default one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            metrics = self._backward(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return metrics

    def _record(self, inputs: Sequence[Tensor]) -> "_Recording":
        held = [value.clone() for value in inputs]
        for parameter in self._parameters:
            parameter.grad = None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            metrics = self._backward(*held)
        return _Recording(graph, held, [parameter.grad for parameter in self._parameters], metrics)


class _Recording(NamedTuple):
    """A computation of gradients."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    gradients: list[Tensor | None]
    metrics: dict[str, Tensor]


def time_for(deadline: float | None, share: float, later: float) -> float | None:
    """The seconds of the next part of a run that ends at a deadline; None: there is none.

    Args:
        deadline: by `time.monotonic()`.
        share: of the part.
        later: the shares of all parts after it. What one leaves is theirs.
    """
    if deadline is None:
        return None
    return max(deadline - time.monotonic(), 0.0) * share / (share + later)


def steps_done(directory: Path) -> int:
    """How many steps of an earlier run in the directory are kept."""
    return int(_kept(directory, "step"))


def progress_of(directory: Path) -> float:
    """How far an earlier run in the directory came, from 0 to 1."""
    return _kept(directory, "progress")


def _kept(directory: Path, name: str) -> float:
    path = directory / CHECKPOINT
    return float(torch.load(path, weights_only=True, mmap=True)[name]) if path.exists() else 0.0


def _optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    # Muon is for the matrices between hidden layers; the outermost ones are Adam's
    outer = ("proj_out", "x_embedder", "ref_embedder", "time_text_embed", "motion_", "fps_")
    matrices = [
        value for name, value in trained.items() if value.ndim == 2 and not name.startswith(outer)
    ]
    others = [value for name, value in trained.items() if value.ndim != 2 or name.startswith(outer)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.97), weight_decay=0.01)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=10 * learning_rate))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def _save(
    path: Path,
    model: nn.Module,
    ema: list[Tensor],
    optimizers: list[torch.optim.Optimizer],
    clock: Clock,
) -> None:
    """Writes the state beside the old one first, so that a stop in between costs nothing."""
    state = {
        "model": model.state_dict(),
        "ema": ema,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": clock.step,
        "progress": clock.progress,
    }
    with atomic_write(path) as part:
        torch.save(state, part)
