"""One training run: a schedule, an average of the weights, a log, and going on after a stop."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.muon import Muon

CHECKPOINT = "checkpoint.pt"
LOGGED_STEPS = 50
CHECKPOINT_STEPS = 50
AVERAGE_DECAY = 0.995


def train(
    model: nn.Module,
    descend: Callable[[], dict[str, Tensor]],
    *,
    directory: Path,
    steps: int,
    learning_rate: float,
    decay_share: float = 0.3,
) -> nn.Module:
    """Trains the model in place; goes on where an earlier run in the directory stopped.

    Matrices are stepped by Muon, all else by AdamW. The rate warms up over 50 steps, stays, and
    falls to nothing over the last `decay_share` of the steps. What is returned is the model with
    the running average of its weights.

    Args:
        model: in float32; its forward passes may run in bfloat16.
        descend: gives the parameters their gradients, and returns figures for the log, each a
            scalar on any device.
        directory: gets `checkpoint.pt` and `log.jsonl`.
        steps: in all, those of earlier runs counted.
        learning_rate: AdamW's; Muon's is ten times as much.
        decay_share: share of the steps over which the rate falls.
    """
    directory.mkdir(parents=True, exist_ok=True)
    optimizers = _optimizers(model, learning_rate)
    weights = list(model.state_dict().values())
    average = [value.detach().clone() for value in weights]
    done = 0
    path = directory / CHECKPOINT
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=weights[0].device)
        model.load_state_dict(state["model"])
        average, done = state["average"], state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    began, seen = time.monotonic(), list[dict[str, Tensor]]()
    with (directory / "log.jsonl").open("a") as log:
        for step in range(done, steps):
            rate = min(1, (step + 1) / 50, (steps - step) / (decay_share * steps))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * rate
            seen.append(descend())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(AVERAGE_DECAY, step / (step + 10))
            torch._foreach_lerp_(average, weights, 1 - decay)
            if (step + 1) % LOGGED_STEPS == 0 or step + 1 == steps:
                # read here alone: each reading waits for the device
                line: dict[str, Any] = {"step": step + 1}
                line |= {
                    name: round(torch.stack([figures[name] for figures in seen]).mean().item(), 5)
                    for name in seen[0]
                }
                line["seconds"] = round(time.monotonic() - began, 1)
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(json.dumps(line), flush=True)  # noqa: T201
                seen.clear()
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
                _save(path, model, average, optimizers, step + 1)
    if any(not math.isfinite(value.sum().item()) for value in average):
        raise ArithmeticError("the training diverged")
    model.load_state_dict(dict(zip(model.state_dict(), average, strict=True)))
    return model.eval()


class Descent:
    """The gradients of a loss; on a GPU its many small launches are recorded once and replayed."""

    def __init__(
        self, model: nn.Module, loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    ) -> None:
        self._parameters = list(model.parameters())
        self._loss_of = loss_of
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Gives the parameters their gradients. The inputs have the same shapes in every call."""
        if inputs[0].device.type != "cuda":
            return self._descend(*inputs)
        if self._graph is None:
            self._record(inputs)
            assert self._graph is not None
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in self._figures.items()}

    def _descend(self, *inputs: Tensor) -> dict[str, Tensor]:
        loss, figures = self._loss_of(*inputs)
        loss.backward()
        return {"loss": loss.detach(), **figures}

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what libraries set up at their first use cannot be recorded
                self._descend(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self._parameters:
            parameter.grad = None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._figures = self._descend(*self._inputs)
        self._gradients = [parameter.grad for parameter in self._parameters]


def steps_done(directory: Path) -> int:
    """How many steps of an earlier run in the directory are kept."""
    path = directory / CHECKPOINT
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else 0


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
    average: list[Tensor],
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> None:
    """Writes the state beside the old one first, so that a stop in between costs nothing."""
    partial = path.with_suffix(".partial")
    state = {
        "model": model.state_dict(),
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    torch.save(state, partial)
    partial.replace(path)
